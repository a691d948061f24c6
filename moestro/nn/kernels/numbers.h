// Numbers as the CPU kernels see them: float and bfloat16 in memory, float in arithmetic; e^x that vectorises.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

struct bf16 {
  uint16_t bits;
};

inline float load(float x) { return x; }
inline float load(bf16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline void store(float* p, float x) { *p = x; }
inline void store(bf16* p, float x) {  // round to nearest even; NaN stays NaN because its payload survives the shift
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
  bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
  p->bits = static_cast<uint16_t>(is_nan ? (bits >> 16) | 0x40 : rounded >> 16);
}

// e^x to about 1 unit in the last place, branch-free so that it vectorises: x = n ln 2 + r, polynomial in r (Cephes).
inline float exp_fast(float x) {
  float bounded = std::min(std::max(x, -87.0f), 88.0f);
  float n = std::nearbyint(bounded * 1.44269504f);
  float r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, 4);
  return x != x ? x : p * scale;
}
inline float sigmoid(float x) { return 1.0f / (1.0f + exp_fast(-x)); }

}  // namespace
