// Matrix products on one thread, C = A B, for operands that are gathered, transposed or converted on the way.
//
//     operands -> pack (rows by index, transpose, float to bfloat16) -> tiles held in registers -> C
//
// Packing reads every number once and copies it in the order in which the tiles take it, so that a gather, a
// transposition or a conversion costs nothing extra, and no shape needs padding or compiling. The next panel of B is
// fetched while this one is multiplied. A number of C is summed by one thread in the order of k (blocks of kDeep):
// the result does not depend on who computes it (Goto 2008; Van Zee 2015).
//
// A unit is what one lane multiplies at a time: a float, or two neighbours in k in bfloat16.

#pragma once

#include <atomic>
#include <chrono>
#include <utility>
#include <vector>

#include "numbers.h"
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kTall = 14;
#elif defined(__AVX__)
constexpr int kLanes = 8, kTall = 6;
#else
constexpr int kLanes = 4, kTall = 12;
#endif
constexpr int kWide = 2 * kLanes;      // columns of a tile
constexpr int64_t kDeep = 1024;        // units summed before a tile leaves the registers
constexpr int64_t kRows = 256;         // rows of A packed at a time
typedef float vec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t uvec __attribute__((vector_size(4 * kLanes)));

template <class T>
constexpr int kPair = 4 / sizeof(T);  // numbers in a unit

inline vec load_vec(const float* p) {
  vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store_vec(float* p, vec v) { std::memcpy(p, &v, sizeof v); }

inline uint32_t bits_of(bf16 x) { return x.bits; }
inline uint32_t bits_of(float x) {
  bf16 rounded;
  store(&rounded, x);
  return rounded.bits;
}

// sum += a b, lane by lane; a is one unit for all lanes.
template <class T>
inline vec multiply_add(vec sum, float a, vec b);
template <>
inline vec multiply_add<float>(vec sum, float a, vec b) {
  return sum + a * b;
}
template <>
inline vec multiply_add<bf16>(vec sum, float a, vec b) {
#if defined(__AVX512BF16__)
  return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(a), (__m512bh)b);
#else
  uint32_t both;
  std::memcpy(&both, &a, 4);
  uint32_t low = both << 16, high = both & 0xffff0000u;
  float even, odd;
  std::memcpy(&even, &low, 4);
  std::memcpy(&odd, &high, 4);
  return sum + even * (vec)((uvec)b << 16) + odd * (vec)((uvec)b & 0xffff0000u);
#endif
}

// A matrix of S seen as [k, j]: where number (k, j) lies, and whether neighbours in memory differ in k or in j.
template <class S>
struct Operand {
  const S* data;
  int64_t stride;        // numbers from one row in memory to the next
  const int64_t* index;  // the row in memory behind row i; null: i
  bool rows_are_k;       // rows in memory are k (else j)

  const S* row(int64_t i) const { return data + (index ? index[i] : i) * stride; }
};

// kLanes units from up to kLanes * pair numbers; what is missing is zero.
template <class T, class S>
inline vec read_units(const S* from, int64_t numbers) {
  constexpr int full = kLanes * kPair<T>;
  S padded[full];
  if (numbers < full) {
    std::memset(static_cast<void*>(padded), 0, sizeof padded);
    std::memcpy(static_cast<void*>(padded), from, std::max<int64_t>(numbers, 0) * sizeof(S));
    from = padded;
  }
  if constexpr (sizeof(S) == sizeof(T)) {
    return load_vec(reinterpret_cast<const float*>(from));
  } else {
#if defined(__AVX512BF16__)
    return (vec)_mm512_cvtne2ps_pbh((__m512)load_vec(from + kLanes), (__m512)load_vec(from));
#else
    bf16 rounded[full];
    for (int i = 0; i < full; i++) store(rounded + i, from[i]);
    return load_vec(reinterpret_cast<const float*>(rounded));
#endif
  }
}

template <int step, size_t... i>
inline void exchange(vec& a, vec& b, std::index_sequence<i...>) {
  vec low = __builtin_shufflevector(a, b, ((i & step) ? kLanes + i - step : i)...);
  b = __builtin_shufflevector(a, b, ((i & step) ? kLanes + i : i + step)...);
  a = low;
}

template <int step>
inline void transpose(vec (&rows)[kLanes]) {
  if constexpr (step < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++)
      if (!(i & step)) exchange<step>(rows[i], rows[i + step], std::make_index_sequence<kLanes>());
    transpose<2 * step>(rows);
  }
}

// Columns first..first+width of op, all k from `begin` to `end` (numbers), as units [k][padded]; columns beyond are 0.
// Writes up to kLanes units past the end.
template <class T, class S>
void pack(const Operand<S>& op, int64_t first, int64_t width, int64_t padded, int64_t begin, int64_t end, float* out) {
  constexpr int pair = kPair<T>;
  if (op.rows_are_k) {
    for (int64_t k = begin; k < end; k += pair, out += padded) {
      const S* even = op.row(k) + first;
      if constexpr (pair == 1) {
        std::memcpy(out, even, width * 4);
      } else {
        const S* odd = k + 1 < end ? op.row(k + 1) + first : nullptr;
        uint32_t* units = reinterpret_cast<uint32_t*>(out);
        if (odd) {
#pragma omp simd
          for (int64_t j = 0; j < width; j++) units[j] = bits_of(even[j]) | bits_of(odd[j]) << 16;
        } else {
          for (int64_t j = 0; j < width; j++) units[j] = bits_of(even[j]);
        }
      }
      for (int64_t j = width; j < padded; j++) out[j] = 0.0f;
    }
    return;
  }
  for (int64_t j = 0; j < padded; j += kLanes)
    for (int64_t k = begin; k < end; k += kLanes * pair) {
      vec rows[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; i++)
        rows[i] = j + i < width ? read_units<T>(op.row(first + j + i) + k, end - k) : vec{};
      transpose<1>(rows);
      float* to = out + (k - begin) / pair * padded + j;
      int64_t units = std::min<int64_t>(kLanes, (end - k + pair - 1) / pair);
      if (j == 0 || j + kLanes <= padded) {  // what falls on the next row is written after
        for (int64_t u = 0; u < units; u++) store_vec(to + u * padded, rows[u]);
      } else {
        for (int64_t u = 0; u < units; u++) std::memcpy(to + u * padded, &rows[u], (padded - j) * 4);
      }
    }
}

// Where a tile goes: C itself, or sums kept until the last block of k.
template <class Out>
struct Place {
  Out* c;
  int64_t stride;
  float* sums;  // kWide numbers a row
  int64_t width;
  bool first, last;
};

template <class T, class Out, int tall>
void tile(int64_t units, const float* a, const float* b, const Place<Out>& at) {
  vec sum[tall][2];
#pragma GCC unroll 16
  for (int i = 0; i < tall; i++) {
    if (at.last) __builtin_prefetch(at.c + i * at.stride, 1);
    sum[i][0] = at.first ? vec{} : load_vec(at.sums + i * kWide);
    sum[i][1] = at.first ? vec{} : load_vec(at.sums + i * kWide + kLanes);
  }
  for (int64_t k = 0; k < units; k++, a += tall, b += kWide) {
    vec left = load_vec(b), right = load_vec(b + kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < tall; i++) {
      sum[i][0] = multiply_add<T>(sum[i][0], a[i], left);
      sum[i][1] = multiply_add<T>(sum[i][1], a[i], right);
    }
  }
  bool whole = sizeof(Out) == 4 && at.last && at.width == kWide;
#pragma GCC unroll 16
  for (int i = 0; i < tall; i++) {
    float* to = whole ? reinterpret_cast<float*>(at.c + i * at.stride) : at.sums + i * kWide;
    store_vec(to, sum[i][0]);
    store_vec(to + kLanes, sum[i][1]);
  }
  if (whole || !at.last) return;
  for (int i = 0; i < tall; i++) {
    Out* row = at.c + i * at.stride;
    const float* sums = at.sums + i * kWide;
    if (at.width == kWide) {
#pragma omp simd
      for (int j = 0; j < kWide; j++) store(row + j, sums[j]);
    } else {
      for (int64_t j = 0; j < at.width; j++) store(row + j, sums[j]);
    }
  }
}

template <class T, class Out, size_t... i>
void tile_of(int64_t tall, int64_t units, const float* a, const float* b, const Place<Out>& at,
             std::index_sequence<i...>) {
  using Tile = void (*)(int64_t, const float*, const float*, const Place<Out>&);
  static constexpr Tile tiles[] = {tile<T, Out, static_cast<int>(i) + 1>...};
  tiles[tall - 1](units, a, b, at);
}

// Memory of one thread for packed operands, kept between calls.
class Scratch {
 public:
  float* a(int64_t size) { return room(a_, size); }
  float* b(int64_t size) { return room(b_, size); }
  float* sums(int64_t size) { return room(sums_, size); }

 private:
  static float* room(std::vector<float>& held, int64_t size) {
    if (static_cast<int64_t>(held.size()) < size + 16) held.resize(size + 16);  // 16: to align
    auto address = reinterpret_cast<uintptr_t>(held.data());
    return held.data() + (64 - address % 64) % 64 / 4;
  }
  std::vector<float> a_, b_, sums_;
};

// Fetch the share part/parts of the next panel.
template <class S>
void fetch(const Operand<S>& op, int64_t first, int64_t width, int64_t begin, int64_t end, int64_t part,
           int64_t parts) {
  int64_t rows = op.rows_are_k ? end - begin : width, from = op.rows_are_k ? first : begin;
  int64_t bytes = (op.rows_are_k ? width : end - begin) * sizeof(S);
  for (int64_t i = rows * part / parts; i < rows * (part + 1) / parts; i++) {
    auto line = reinterpret_cast<const char*>(op.row((op.rows_are_k ? begin : first) + i) + from);
    for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(line + byte, 0, 2);
  }
}

std::atomic<int64_t> multiplying_ns{0};  // spent in tiles by all threads, for measurements

// C [m, n] = A [m, k] B [k, n] for m up to kRows: on this thread. T is the type of the arithmetic's inputs.
template <class T, class SA, class SB, class Out>
void product(const Operand<SA>& a, int64_t a_first, int64_t m, const Operand<SB>& b, int64_t n, int64_t k, Out* c,
             int64_t stride, Scratch& scratch) {
  constexpr int64_t deep = kDeep * kPair<T>;
  int64_t tiles = (m + kTall - 1) / kTall, units = (k + kPair<T> - 1) / kPair<T>;
  auto begin_of = [&](int64_t t) { return m * t / tiles; };
  float* packed_a = scratch.a(m * units + kLanes * kLanes);
  float* packed_b = scratch.b(kDeep * kWide + kLanes * kLanes);
  float* sums = scratch.sums(m * kWide);
  for (int64_t block = 0; block < k; block += deep) {
    int64_t end = std::min(block + deep, k);
    for (int64_t t = 0; t < tiles; t++) {
      int64_t top = begin_of(t), tall = begin_of(t + 1) - top;
      float* to = packed_a + block / kPair<T> * m + top * ((end - block + kPair<T> - 1) / kPair<T>);
      pack<T>(a, a_first + top, tall, tall, block, end, to);
    }
  }
  std::chrono::steady_clock::duration multiplying{};
  for (int64_t j = 0; j < n; j += kWide)
    for (int64_t block = 0; block < k; block += deep) {
      int64_t end = std::min(block + deep, k), deep_units = (end - block + kPair<T> - 1) / kPair<T>;
      int64_t width = std::min<int64_t>(kWide, n - j);
      pack<T>(b, j, width, kWide, block, end, packed_b);
      bool more = end < k;
      int64_t next = more ? j : j + kWide, next_begin = more ? end : 0;
      int64_t next_width = std::min<int64_t>(kWide, n - next), next_end = std::min(next_begin + deep, k);
      const float* from = packed_a + block / kPair<T> * m;
      auto begun = std::chrono::steady_clock::now();
      for (int64_t t = 0; t < tiles; t++) {
        int64_t top = begin_of(t), tall = begin_of(t + 1) - top;
        if (next_width > 0) fetch(b, next, next_width, next_begin, next_end, t, tiles);
        Place<Out> at = {c + top * stride + j, stride, sums + top * kWide, width, block == 0, end == k};
        tile_of<T>(tall, deep_units, from + top * deep_units, packed_b, at, std::make_index_sequence<kTall>());
      }
      multiplying += std::chrono::steady_clock::now() - begun;
    }
  multiplying_ns += std::chrono::duration_cast<std::chrono::nanoseconds>(multiplying).count();
}

}  // namespace
