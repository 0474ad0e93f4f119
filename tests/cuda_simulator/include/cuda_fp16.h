// half.
#pragma once

#include "cuda_simulator/float16.h"

using __half = cuda_simulator::Float16<cuda_simulator::HalfBits>;
using __half2 = cuda_simulator::Pair<__half>;
using half = __half;
using half2 = __half2;
CUDA_SIMULATOR_FLOAT16(__half, __half2, half)
