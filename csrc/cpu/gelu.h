// GELU with the exact error function, and its derivative.
#pragma once

#include "cpu/exp.h"

namespace mra::cpu::MRA_ISA {

// erf(x), within 4e-7; a NaN stays one. A quotient of polynomials in x^2, fitted to equal relative ripple up to 3.92,
// from where float32 has no number between erf and 1.
inline Floats erf(Floats x) {
  const Words sign = (Words)x & 0x80000000u;
  const Floats one = (Floats)((Words)broadcast(1.0f) | sign);
  const Words large = (Words)(x * x >= 3.92f * 3.92f);
  const Floats t = choose(large, Floats{}, x * x);
  Floats p = broadcast(2.0501113340287702e-06f);
  p = p * t + 2.8487929375842214e-04f;
  p = p * t + 3.7654726766049862e-03f;
  p = p * t + 5.2748281508684158e-02f;
  p = p * t + 1.9040313363075256e-01f;
  p = p * t + 1.1283791065216064f;
  Floats q = broadcast(3.809178451774642e-05f);
  q = q * t + 1.1625001206994057e-03f;
  q = q * t + 1.4968929812312126e-02f;
  q = q * t + 1.1410773545503616e-01f;
  q = q * t + 5.0207310914993286e-01f;
  q = q * t + 1.0f;
  return choose(large, one, x * p / q);
}

inline Floats gelu(Floats x) { return 0.5f * x * (1.0f + erf(x * 0.707106781f)); }

// The derivative: Phi(x) + x phi(x).
inline Floats gelu_slope(Floats x) {
  const Floats density = 0.398942280f * exp_negative(-0.5f * x * x);
  // Far out the product is 0 * infinity.
  const Words far = (Words)(x * x > 170.0f);
  return 0.5f * (1.0f + erf(x * 0.707106781f)) + choose(far, Floats{}, x * density);
}

}  // namespace mra::cpu::MRA_ISA
