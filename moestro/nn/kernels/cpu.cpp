// The parts of a training step that are not matrix products, each in one pass over memory.
//
// Plain C++ on raw pointers, compiled at first use by nn/kernels/cpu.py (no Python or torch headers). Matrices are
// row-major and contiguous; T is float or bfloat16, arithmetic is float. Results do not depend on the number of
// threads: rows are independent, and sums over rows go through fixed blocks that are added in order.

#include <vector>

#include "numbers.h"

namespace {

constexpr int64_t kSmall = 1 << 14;  // numbers below which waking other threads costs more than they help

// y[t] = sum over k of rows[slot[t, k]]; slot -1 adds nothing. The order of the sum is the order of k.
template <class T>
void combine(const T* rows, const int64_t* slot, T* y, int64_t tokens, int64_t choices, int64_t width) {
#pragma omp parallel if (tokens * width > kSmall)
  {
    std::vector<float> sum(width);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tokens; t++) {
      std::fill(sum.begin(), sum.end(), 0.0f);
      for (int64_t k = 0; k < choices; k++) {
        int64_t from = slot[t * choices + k];
        if (from < 0) continue;
        const T* row = rows + from * width;
#pragma omp simd
        for (int64_t j = 0; j < width; j++) sum[j] += load(row[j]);
      }
#pragma omp simd
      for (int64_t j = 0; j < width; j++) store(y + t * width + j, sum[j]);
    }
  }
}

// y = x * scale / rms(x); rstd keeps 1 / rms per row for the way back.
template <class X, class Y>
void rms_norm(const X* x, const float* scale, Y* y, float* rstd, int64_t rows, int64_t width, float eps) {
#pragma omp parallel for schedule(static) if (rows * width > kSmall)
  for (int64_t i = 0; i < rows; i++) {
    const X* in = x + i * width;
    float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
    for (int64_t j = 0; j < width; j++) squares += load(in[j]) * load(in[j]);
    float r = 1.0f / std::sqrt(squares / width + eps);
    rstd[i] = r;
#pragma omp simd
    for (int64_t j = 0; j < width; j++) store(y + i * width + j, load(in[j]) * r * scale[j]);
  }
}

constexpr int64_t kBlocks = 32;

template <class X, class Y>
void rms_norm_backward(const X* x, const float* scale, const float* rstd, const Y* d_y, X* d_x, float* d_scale,
                       int64_t rows, int64_t width) {
  std::vector<float> partial(kBlocks * width, 0.0f);
#pragma omp parallel for schedule(static) if (rows * width > kSmall)
  for (int64_t block = 0; block < kBlocks; block++) {
    float* sums = partial.data() + block * width;
    for (int64_t i = rows * block / kBlocks; i < rows * (block + 1) / kBlocks; i++) {
      const X* in = x + i * width;
      const Y* d = d_y + i * width;
      float r = rstd[i], dot = 0.0f;
#pragma omp simd reduction(+ : dot)
      for (int64_t j = 0; j < width; j++) {
        float unit = load(in[j]) * r;
        dot += load(d[j]) * scale[j] * unit;
        sums[j] += load(d[j]) * unit;
      }
      dot /= width;
#pragma omp simd
      for (int64_t j = 0; j < width; j++)
        store(d_x + i * width + j, r * (load(d[j]) * scale[j] - load(in[j]) * r * dot));
    }
  }
  for (int64_t j = 0; j < width; j++) {
    float sum = 0.0f;
    for (int64_t block = 0; block < kBlocks; block++) sum += partial[block * width + j];
    d_scale[j] = sum;
  }
}

// Scores [matrices, queries, keys] to causal softmax weights, in place; query i sees keys 0..i + keys - queries.
template <class T>
void causal_softmax(T* scores, int64_t matrices, int64_t queries, int64_t keys, float scale) {
#pragma omp parallel for schedule(dynamic, 64) if (matrices * queries * keys > kSmall)
  for (int64_t n = 0; n < matrices * queries; n++) {
    T* row = scores + n * keys;
    int64_t seen = n % queries + 1 + keys - queries;
    float top = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < seen; j++) top = std::max(top, load(row[j]));
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < seen; j++) sum += exp_fast((load(row[j]) - top) * scale);
    float share = 1.0f / sum;
#pragma omp simd
    for (int64_t j = 0; j < seen; j++) store(row + j, exp_fast((load(row[j]) - top) * scale) * share);
    std::memset(static_cast<void*>(row + seen), 0, (keys - seen) * sizeof(T));
  }
}

// d_weights becomes d_scores, in place.
template <class T>
void causal_softmax_backward(const T* weights, T* d_weights, int64_t matrices, int64_t queries, int64_t keys,
                             float scale) {
#pragma omp parallel for schedule(dynamic, 64) if (matrices * queries * keys > kSmall)
  for (int64_t n = 0; n < matrices * queries; n++) {
    const T* w = weights + n * keys;
    T* d = d_weights + n * keys;
    int64_t seen = n % queries + 1 + keys - queries;
    float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
    for (int64_t j = 0; j < seen; j++) dot += load(w[j]) * load(d[j]);
#pragma omp simd
    for (int64_t j = 0; j < seen; j++) store(d + j, load(w[j]) * (load(d[j]) - dot) * scale);
    std::memset(static_cast<void*>(d + seen), 0, (keys - seen) * sizeof(T));
  }
}

// Logits become d_logits of `scale` times the summed cross-entropy, in place; losses are per row, in nats, unscaled.
template <class T>
void cross_entropy(T* logits, const int64_t* target, float* losses, int64_t rows, int64_t width, float scale) {
#pragma omp parallel for schedule(static) if (rows * width > kSmall)
  for (int64_t i = 0; i < rows; i++) {
    T* row = logits + i * width;
    float top = -INFINITY, sum = 0.0f, wanted = load(row[target[i]]);
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < width; j++) top = std::max(top, load(row[j]));
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < width; j++) sum += exp_fast(load(row[j]) - top);
    losses[i] = std::log(sum) + top - wanted;
    float share = scale / sum;
#pragma omp simd
    for (int64_t j = 0; j < width; j++) store(row + j, exp_fast(load(row[j]) - top) * share);
    store(row + target[i], std::exp(wanted - top) * share - scale);
  }
}

// Rows x[b, h, s] and y[b, h, s] of a tensor start at b, h, s times these many numbers.
struct Strides {
  int64_t b, h, s;
};

// Turn each pair (x[p], x[p + pairs]) by the angle of its position: y = (a cos - b sin, b cos + a sin).
template <class T>
void rotate(const T* x, Strides xs, const float* cosine, const float* sine, float direction, T* y, Strides ys,
            int64_t batch, int64_t heads, int64_t positions, int64_t pairs) {
#pragma omp parallel for collapse(3) schedule(static) if (batch * heads * positions * pairs > kSmall)
  for (int64_t b = 0; b < batch; b++)
    for (int64_t h = 0; h < heads; h++)
      for (int64_t s = 0; s < positions; s++) {
        const T* from = x + b * xs.b + h * xs.h + s * xs.s;
        T* to = y + b * ys.b + h * ys.h + s * ys.s;
        const float *c = cosine + s * pairs, *i = sine + s * pairs;
#pragma omp simd
        for (int64_t p = 0; p < pairs; p++) {
          float first = load(from[p]), second = load(from[p + pairs]), turn = direction * i[p];
          store(to + p, first * c[p] - second * turn);
          store(to + p + pairs, second * c[p] + first * turn);
        }
      }
}

// One step of AdamW (Loshchilov 2017) on gradients times `scale`, in one pass over memory.
struct AdamW {
  float lr, beta1, beta2, eps, decay, scale;
  float correction1, root2;  // 1 - beta1^step and sqrt(1 - beta2^step)
};

void adamw(float* weight, const float* gradient, float* mean, float* square, int64_t size, AdamW s) {
  float keep = 1.0f - s.lr * s.decay, rate = s.lr / s.correction1, new1 = 1.0f - s.beta1, new2 = 1.0f - s.beta2;
#pragma omp parallel for schedule(static) if (size > kSmall)
  for (int64_t begin = 0; begin < size; begin += kSmall) {
    float *__restrict w = weight + begin, *__restrict m = mean + begin, *__restrict v = square + begin;
    const float* __restrict g = gradient + begin;
    int64_t left = std::min(kSmall, size - begin);
#pragma omp simd
    for (int64_t i = 0; i < left; i++) {
      float d = g[i] * s.scale;
      m[i] += new1 * (d - m[i]);
      v[i] = s.beta2 * v[i] + new2 * d * d;
      w[i] = w[i] * keep - rate * m[i] / (std::sqrt(v[i]) / s.root2 + s.eps);
    }
  }
}

// The sum of squares: of blocks in float, of their sums in double and in order.
double sum_of_squares(const float* x, int64_t size) {
  int64_t blocks = (size + kSmall - 1) / kSmall;
  std::vector<float> sums(blocks);
#pragma omp parallel for schedule(static) if (size > kSmall)
  for (int64_t b = 0; b < blocks; b++) {
    const float* from = x + b * kSmall;
    int64_t left = std::min(kSmall, size - b * kSmall);
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < left; i++) sum += from[i] * from[i];
    sums[b] = sum;
  }
  double total = 0.0;
  for (float sum : sums) total += sum;
  return total;
}

// Counting sort of assignments by expert, stable. expert[i] == experts marks an unused place.
//   count[e]  rows of expert e      source[n]  the assignment behind sorted row n      slot[i]  its inverse, or -1
int64_t sort_by_expert(const int64_t* expert, int64_t assignments, int64_t experts, int64_t* count, int64_t* source,
                       int64_t* slot) {
  std::vector<int64_t> next(experts + 1, 0);
  std::fill(count, count + experts, 0);
  for (int64_t i = 0; i < assignments; i++)
    if (expert[i] >= 0 && expert[i] < experts) count[expert[i]]++;
  for (int64_t e = 0; e < experts; e++) next[e + 1] = next[e] + count[e];
  int64_t used = next[experts];
  for (int64_t i = 0; i < assignments; i++) {
    if (expert[i] < 0 || expert[i] >= experts) {
      slot[i] = -1;
      continue;
    }
    int64_t row = next[expert[i]]++;
    source[row] = i;
    slot[i] = row;
  }
  return used;
}

}  // namespace

#define EXPORT(name, T)                                                                                               \
  void combine_##name(const T* rows, const int64_t* slot, T* y, int64_t t, int64_t k, int64_t d) {                    \
    combine(rows, slot, y, t, k, d);                                                                                  \
  }                                                                                                                   \
  void rotate_##name(const T* x, int64_t xb, int64_t xh, int64_t xs, const float* c, const float* s, float direction,   \
                     T* y, int64_t yb, int64_t yh, int64_t ys, int64_t b, int64_t h, int64_t n, int64_t p) {          \
    rotate(x, {xb, xh, xs}, c, s, direction, y, {yb, yh, ys}, b, h, n, p);                                            \
  }                                                                                                                   \
  void causal_softmax_##name(T* s, int64_t n, int64_t q, int64_t k, float scale) {                                    \
    causal_softmax(s, n, q, k, scale);                                                                                \
  }                                                                                                                   \
  void causal_softmax_backward_##name(const T* w, T* d, int64_t n, int64_t q, int64_t k, float scale) {               \
    causal_softmax_backward(w, d, n, q, k, scale);                                                                    \
  }                                                                                                                   \
  void cross_entropy_##name(T* logits, const int64_t* target, float* losses, int64_t n, int64_t v, float scale) {     \
    cross_entropy(logits, target, losses, n, v, scale);                                                               \
  }

#define EXPORT_NORM(name, X, Y)                                                                                       \
  void rms_norm_##name(const X* x, const float* s, Y* y, float* r, int64_t n, int64_t d, float eps) {                 \
    rms_norm(x, s, y, r, n, d, eps);                                                                                  \
  }                                                                                                                   \
  void rms_norm_backward_##name(const X* x, const float* s, const float* r, const Y* dy, X* dx, float* ds, int64_t n, \
                                int64_t d) {                                                                          \
    rms_norm_backward(x, s, r, dy, dx, ds, n, d);                                                                     \
  }

extern "C" {
EXPORT(f32, float)
EXPORT(bf16, bf16)
EXPORT_NORM(f32_f32, float, float)
EXPORT_NORM(f32_bf16, float, bf16)
EXPORT_NORM(bf16_bf16, bf16, bf16)
void adamw_step(float* w, const float* g, float* m, float* v, int64_t n, float lr, float beta1, float beta2, float eps,
                float decay, float scale, float correction1, float root2) {
  adamw(w, g, m, v, n, {lr, beta1, beta2, eps, decay, scale, correction1, root2});
}
double squares(const float* x, int64_t n) { return sum_of_squares(x, n); }
int64_t count_sort(const int64_t* expert, int64_t n, int64_t e, int64_t* count, int64_t* source, int64_t* slot) {
  return sort_by_expert(expert, n, e, count, source, slot);
}
}
