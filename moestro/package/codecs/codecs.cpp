// Hot loops of the codecs: byte planes, differences of bit patterns, entropy coding, low-rank and quantised updates.
//
// Compiled at first use by package/kernels.py, without fused multiply-add. Every function has a NumPy twin in
// package/codecs/ that gives the same bytes. Inputs come from untrusted files: whatever indexes memory is checked here
// or by the caller, and a failed check returns a negative number.

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

// ---- bit patterns ----------------------------------------------------------------------------------------------

enum Mode { kPlain, kRotate, kXor, kFloatDifference, kIntDifference };  // as in codecs/planes.py

template <class U>
inline U ordered(U u) {  // order of the numbers equals order of these integers
  constexpr U sign = static_cast<U>(U(1) << (8 * sizeof(U) - 1));
  return u & sign ? static_cast<U>(~u) : static_cast<U>(u | sign);
}
template <class U>
inline U unordered(U o) {
  constexpr U sign = static_cast<U>(U(1) << (8 * sizeof(U) - 1));
  return o & sign ? static_cast<U>(o & static_cast<U>(~sign)) : static_cast<U>(~o);
}
template <class U>
inline U zigzag(U d) {
  return static_cast<U>(static_cast<U>(d << 1) ^ static_cast<U>(-(d >> (8 * sizeof(U) - 1))));
}
template <class U>
inline U unzigzag(U z) {
  return static_cast<U>((z >> 1) ^ static_cast<U>(-(z & 1)));
}

template <class U, int mode>
inline U forward(U b, U a) {
  constexpr int bits = 8 * sizeof(U);
  if (mode == kRotate) return static_cast<U>(static_cast<U>(b << 1) | static_cast<U>(b >> (bits - 1)));
  if (mode == kXor) return static_cast<U>(b ^ a);
  if (mode == kFloatDifference) return zigzag<U>(static_cast<U>(ordered<U>(b) - ordered<U>(a)));
  if (mode == kIntDifference) return zigzag<U>(static_cast<U>(b - a));
  return b;
}
template <class U, int mode>
inline U backward(U x, U a) {
  constexpr int bits = 8 * sizeof(U);
  if (mode == kRotate) return static_cast<U>(static_cast<U>(x >> 1) | static_cast<U>(x << (bits - 1)));
  if (mode == kXor) return static_cast<U>(x ^ a);
  if (mode == kFloatDifference) return unordered<U>(static_cast<U>(ordered<U>(a) + unzigzag<U>(x)));
  if (mode == kIntDifference) return static_cast<U>(a + unzigzag<U>(x));
  return x;
}

template <class U, int mode>
void split(const U* b, const U* a, int64_t n, uint8_t* planes) {
  constexpr int width = sizeof(U);
  for (int64_t i = 0; i < n; i++) {
    U x = forward<U, mode>(b[i], mode >= kXor ? a[i] : U(0));
    for (int p = 0; p < width; p++) planes[p * n + i] = static_cast<uint8_t>(x >> (8 * (width - 1 - p)));
  }
}
template <class U, int mode>
void join(const uint8_t* const* planes, const U* a, int64_t n, U* b) {
  constexpr int width = sizeof(U);
  const uint8_t* plane[width];
  for (int p = 0; p < width; p++) plane[p] = planes[p];
  for (int64_t i = 0; i < n; i++) {
    U x = 0;
    for (int p = 0; p < width; p++) x = static_cast<U>(x | static_cast<U>(U(plane[p][i]) << (8 * (width - 1 - p))));
    b[i] = backward<U, mode>(x, mode >= kXor ? a[i] : U(0));
  }
}

template <class U>
int split_any(const void* b, const void* a, int64_t n, int mode, uint8_t* planes) {
  const U *target = static_cast<const U*>(b), *base = static_cast<const U*>(a);
  switch (mode) {
    case kPlain: split<U, kPlain>(target, base, n, planes); return 0;
    case kRotate: split<U, kRotate>(target, base, n, planes); return 0;
    case kXor: split<U, kXor>(target, base, n, planes); return 0;
    case kFloatDifference: split<U, kFloatDifference>(target, base, n, planes); return 0;
    case kIntDifference: split<U, kIntDifference>(target, base, n, planes); return 0;
  }
  return -1;
}
template <class U>
int join_any(const uint8_t* const* planes, const void* a, int64_t n, int mode, void* b) {
  const U* base = static_cast<const U*>(a);
  U* target = static_cast<U*>(b);
  switch (mode) {
    case kPlain: join<U, kPlain>(planes, base, n, target); return 0;
    case kRotate: join<U, kRotate>(planes, base, n, target); return 0;
    case kXor: join<U, kXor>(planes, base, n, target); return 0;
    case kFloatDifference: join<U, kFloatDifference>(planes, base, n, target); return 0;
    case kIntDifference: join<U, kIntDifference>(planes, base, n, target); return 0;
  }
  return -1;
}

// ---- differences as symbols (codecs/symbols.py tells the alphabet) ------------------------------------------------

struct BitWriter {
  uint8_t* out;
  uint64_t held = 0;
  int count = 0;
  int64_t bytes = 0;
  void put(uint32_t value, int width) {  // width <= 30
    held |= static_cast<uint64_t>(value) << count;
    count += width;
    while (count >= 8) {
      out[bytes++] = static_cast<uint8_t>(held);
      held >>= 8;
      count -= 8;
    }
  }
  int64_t finish() {
    if (count) out[bytes++] = static_cast<uint8_t>(held);
    return bytes;
  }
};

struct BitReader {
  const uint8_t* in;
  int64_t bytes;
  int64_t place = 0;
  uint64_t held = 0;
  int count = 0;
  bool get(int width, uint32_t* value) {  // width <= 31
    if (count < width) {
      if (place + 8 <= bytes) {  // 7 or 8 bytes at once; what does not fit is read again
        uint64_t next;
        std::memcpy(&next, in + place, 8);
        held |= next << count;
        place += (63 - count) >> 3;
        count |= 56;
      } else {
        while (count < width) {
          if (place == bytes) return false;
          held |= static_cast<uint64_t>(in[place++]) << count;
          count += 8;
        }
      }
    }
    *value = static_cast<uint32_t>(held & ((uint64_t(1) << width) - 1));
    held >>= width;
    count -= width;
    return true;
  }
  bool done() const {  // less than a byte is left, and it is zero
    int64_t left = 8 * (bytes - place) + count;
    return left == 0 || (left < 8 && in[bytes - 1] >> (8 - left) == 0);
  }
};

template <class U, class S>
int64_t to_symbols(const U* base, const U* target, int64_t n, uint8_t* symbols, uint8_t* extra) {
  BitWriter bits{extra};
  for (int64_t i = 0; i < n; i++) {
    S d = static_cast<S>(static_cast<U>(ordered<U>(target[i]) - ordered<U>(base[i])));
    if (d >= -15 && d <= 15) {
      symbols[i] = static_cast<uint8_t>(15 + d);
      continue;
    }
    uint32_t negative = d < 0, a = negative ? static_cast<uint32_t>(-static_cast<int64_t>(d)) : static_cast<uint32_t>(d);
    int e = 31 - __builtin_clz(a), low = e - 2;
    symbols[i] = static_cast<uint8_t>(31 + 4 * (e - 4) + ((a >> low) & 3));
    bits.put((a & ((1u << low) - 1)) | negative << low, low + 1);
  }
  return bits.finish();
}
template <class U>
int from_symbols(const U* base, const uint8_t* symbols, int64_t n, const uint8_t* extra, int64_t extra_bytes, U* out) {
  BitReader bits{extra, extra_bytes};
  constexpr int highest = 31 + 4 * (8 * sizeof(U) - 5) + 3;
  for (int64_t i = 0; i < n; i++) {
    int s = symbols[i];
    U d;
    if (s < 31) {
      d = static_cast<U>(s - 15);
    } else {
      if (s > highest) return -1;
      int e = 4 + (s - 31) / 4, low = e - 2;
      uint32_t value;
      if (!bits.get(low + 1, &value)) return -2;
      uint32_t a = (4u | ((s - 31) & 3)) << low | (value & ((1u << low) - 1));
      d = static_cast<U>(value >> low ? 0u - a : a);
    }
    out[i] = unordered<U>(static_cast<U>(ordered<U>(base[i]) + d));
  }
  return bits.done() ? 0 : -3;
}

// ---- numbers -------------------------------------------------------------------------------------------------------

enum Float { kBfloat16, kFloat16, kFloat32 };  // as in codecs/numbers.py

inline float from_bf16(uint16_t bits) {
  uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}
inline uint16_t to_bf16(float value) {  // round to nearest even; any NaN becomes one
  uint32_t wide;
  std::memcpy(&wide, &value, 4);
  if ((wide & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return static_cast<uint16_t>((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
}
inline float from_half(uint16_t bits) {
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return static_cast<float>(value);
}
inline uint16_t to_half(float value) {
  if (value != value) return 0x7e00;
  _Float16 half = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
inline float from_single(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t to_single(float value) {
  if (value != value) return 0x7fc00000;
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

template <class U, float load(U), U store(float)>
void predict_row(const U* a, const float* p, const float* q, int64_t rank, int64_t stride, int64_t n, float* sum, U* out) {
  for (int64_t j = 0; j < n; j++) sum[j] = load(a[j]);
  for (int64_t k = 0; k < rank; k++) {
    const float factor = p[k], *row = q + k * stride;
    for (int64_t j = 0; j < n; j++) sum[j] = sum[j] + factor * row[j];
  }
  for (int64_t j = 0; j < n; j++) out[j] = store(sum[j]);
}

template <class U, float load(U), U store(float)>
void predict_range(const void* base, const float* p, const float* q, int64_t rank, int64_t rows, int64_t columns,
                   int64_t first, int64_t n, float* sum, void* predicted) {
  const U* a = static_cast<const U*>(base);
  U* out = static_cast<U*>(predicted);
  for (int64_t i = 0; i < n;) {
    int64_t row = (first + i) / columns, column = (first + i) % columns;
    int64_t count = columns - column < n - i ? columns - column : n - i;
    predict_row<U, load, store>(a + i, p + row * rank, q + row / rows * rank * columns + column, rank, columns, count,
                                sum, out + i);
    i += count;
  }
}

template <class U, float load(U), U store(float)>
void add_scaled(const void* base, const int8_t* q, const float* scales, int64_t group, int64_t first, int64_t n,
                void* result) {
  const U* a = static_cast<const U*>(base);
  U* out = static_cast<U*>(result);
  for (int64_t i = 0; i < n;) {
    int64_t place = (first + i) / group, end = (place + 1) * group - first;
    const float scale = scales[place];
    if (end > n) end = n;
    for (; i < end; i++) {
      float t = scale * static_cast<float>(q[i]);
      out[i] = store(load(a[i]) + t);
    }
  }
}

}  // namespace

extern "C" {

int split_planes(const void* b, const void* a, int64_t n, int width, int mode, uint8_t* planes) {
  switch (width) {
    case 1: return split_any<uint8_t>(b, a, n, mode, planes);
    case 2: return split_any<uint16_t>(b, a, n, mode, planes);
    case 4: return split_any<uint32_t>(b, a, n, mode, planes);
    case 8: return split_any<uint64_t>(b, a, n, mode, planes);
  }
  return -1;
}

int join_planes(const uint8_t* const* planes, const void* a, int64_t n, int width, int mode, void* b) {
  switch (width) {
    case 1: return join_any<uint8_t>(planes, a, n, mode, b);
    case 2: return join_any<uint16_t>(planes, a, n, mode, b);
    case 4: return join_any<uint32_t>(planes, a, n, mode, b);
    case 8: return join_any<uint64_t>(planes, a, n, mode, b);
  }
  return -1;
}

// Symbols of n differences and, packed least significant bit first, what they leave open; returns bytes of the latter.
int64_t difference_symbols(const void* base, const void* target, int64_t n, int width, uint8_t* symbols, uint8_t* extra) {
  if (width == 2)
    return to_symbols<uint16_t, int16_t>(static_cast<const uint16_t*>(base), static_cast<const uint16_t*>(target), n,
                                         symbols, extra);
  return to_symbols<uint32_t, int32_t>(static_cast<const uint32_t*>(base), static_cast<const uint32_t*>(target), n,
                                       symbols, extra);
}

int apply_symbols(const void* base, const uint8_t* symbols, int64_t n, int width, const uint8_t* extra,
                  int64_t extra_bytes, void* out) {
  if (width == 2)
    return from_symbols<uint16_t>(static_cast<const uint16_t*>(base), symbols, n, extra, extra_bytes,
                                  static_cast<uint16_t*>(out));
  return from_symbols<uint32_t>(static_cast<const uint32_t*>(base), symbols, n, extra, extra_bytes,
                                static_cast<uint32_t*>(out));
}

// Exponent fields: bits shift .. shift+7 under mask.
void exponents(const void* base, int64_t n, int width, int shift, int mask, uint8_t* out) {
  if (width == 2) {
    const uint16_t* a = static_cast<const uint16_t*>(base);
    for (int64_t i = 0; i < n; i++) out[i] = static_cast<uint8_t>((a[i] >> shift) & mask);
  } else {
    const uint32_t* a = static_cast<const uint32_t*>(base);
    for (int64_t i = 0; i < n; i++) out[i] = static_cast<uint8_t>((a[i] >> shift) & static_cast<uint32_t>(mask));
  }
}

void count_pairs(const uint8_t* contexts, const uint8_t* symbols, int64_t n, uint32_t* counts) {
  for (int64_t i = 0; i < n; i++) counts[contexts[i] * 256 + symbols[i]]++;
}

// Range ANS with static tables (specification, annex W). freq and cum are [rows][256]; row[c] is the row of context c.
// Words are pushed in the order of encoding; the caller reverses them. Returns how many.
int64_t rans_encode(const uint8_t* symbols, const uint8_t* contexts, const int32_t* row, int64_t n, int64_t lanes,
                    const uint16_t* freq, const uint16_t* cum, uint32_t* states, uint16_t* words) {
  int64_t pushed = 0;
  for (int64_t l = 0; l < lanes; l++) states[l] = 1u << 16;
  for (int64_t i = n - 1; i >= 0; i--) {
    int64_t at = row[contexts[i]] * 256 + symbols[i];
    uint32_t f = freq[at], x = states[i & (lanes - 1)];
    words[pushed] = static_cast<uint16_t>(x);
    bool full = x >= static_cast<uint64_t>(f) << 18;
    pushed += full;
    x = full ? x >> 16 : x;
    states[i & (lanes - 1)] = ((x / f) << 14) + x % f + cum[at];
  }
  return pushed;
}

// slot is [rows][16384]: the symbol at each slot; pair is [rows][256]: frequency, and from bit 16 on the sum of those
// before. Returns 0, or: -1 a context without a table, -2 too few words, -3 words left over, -4 a lane that does not end
// where encoding began.
int rans_decode(uint32_t* states, const uint16_t* words, int64_t num_words, const uint8_t* contexts, const int32_t* row,
                int64_t n, int64_t lanes, const uint32_t* pair, const uint8_t* slot, uint8_t* symbols) {
  int64_t place = 0;
  for (int64_t i = 0; i < n; i++) {
    int32_t r = row[contexts[i]];
    if (r < 0) return -1;
    uint32_t x = states[i & (lanes - 1)], low = x & 16383;
    uint8_t s = slot[r * 16384 + low];
    uint32_t both = pair[r * 256 + s];
    x = (both & 0xffff) * (x >> 14) + low - (both >> 16);
    bool empty = x < (1u << 16);
    if (empty && place == num_words) return -2;
    uint32_t refilled = x << 16 | (empty ? words[place] : 0);
    x = empty ? refilled : x;
    place += empty;
    states[i & (lanes - 1)] = x;
    symbols[i] = s;
  }
  if (place != num_words) return -3;
  for (int64_t l = 0; l < lanes; l++)
    if (states[l] != 1u << 16) return -4;
  return 0;
}

// Prediction of a low-rank update: acc = a; for each k: acc = acc + p[k] * q[k, :], every step rounded to float32.
// `a` and `out` hold elements first .. first + n of [batch x rows, columns]; p is [batch x rows, rank], q is
// [batch, rank, columns], sum has room for a row.
void lowrank_predict(const void* a, const float* p, const float* q, int64_t rank, int64_t rows, int64_t columns,
                     int64_t first, int64_t n, int kind, float* sum, void* out) {
  if (kind == kBfloat16)
    predict_range<uint16_t, from_bf16, to_bf16>(a, p, q, rank, rows, columns, first, n, sum, out);
  else if (kind == kFloat16)
    predict_range<uint16_t, from_half, to_half>(a, p, q, rank, rows, columns, first, n, sum, out);
  else
    predict_range<uint32_t, from_single, to_single>(a, p, q, rank, rows, columns, first, n, sum, out);
}

// out = a + scale * q for elements first .. first + n, `group` of which share a scale, each step rounded (R-8.2.6-3).
void dequantize(const void* a, const int8_t* q, const float* scales, int64_t group, int64_t first, int64_t n, int kind,
                void* out) {
  if (kind == kBfloat16)
    add_scaled<uint16_t, from_bf16, to_bf16>(a, q, scales, group, first, n, out);
  else if (kind == kFloat16)
    add_scaled<uint16_t, from_half, to_half>(a, q, scales, group, first, n, out);
  else
    add_scaled<uint32_t, from_single, to_single>(a, q, scales, group, first, n, out);
}
}
