// The exponential of numbers that are not positive.
#pragma once

#include "cpu/vector.h"

namespace mra::cpu::MRA_ISA {

inline Floats choose(Words where, Floats yes, Floats no) {
  return (Floats)((where & (Words)yes) | (~where & (Words)no));
}

// exp(x) for x <= 0, within 3e-7 relative; 0 below -87; a NaN stays one.
inline Floats exp_negative(Floats x) {
  typedef int32_t Integers __attribute__((vector_size(kLanes * 4)));
  const Words tiny = (Words)(x < -87.0f);
  const Floats t = choose(tiny, Floats{}, x) * 1.44269504f;  // log2(e)
  const Integers whole = __builtin_convertvector(t - 0.5f, Integers);
  const Floats f = (t - __builtin_convertvector(whole, Floats)) * 0.693147181f;  // in [-0.35, 0.35]
  Floats p = broadcast(1.0f / 720);
  p = p * f + 1.0f / 120;
  p = p * f + 1.0f / 24;
  p = p * f + 1.0f / 6;
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  return choose(tiny, Floats{}, p * (Floats)((whole + 127) << 23));
}

}  // namespace mra::cpu::MRA_ISA
