// In place of csrc/common/approximate.cuh, whose PTX is for nvcc alone. Subnormal numbers count as zero here, too.
#pragma once

#include <cmath>

namespace mra::cuda {

inline float flush_to_zero(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

inline float approximate_reciprocal(float x) { return flush_to_zero(1.0f / flush_to_zero(x)); }
inline float approximate_exp2(float x) { return flush_to_zero(exp2f(flush_to_zero(x))); }

}  // namespace mra::cuda
