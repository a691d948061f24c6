// The expert layer forward and backward: gather -> gate and up -> SwiGLU -> down, and all gradients but the router's.
//
// Work is cut into tasks, (expert, some of its rows) or (expert, some rows of a weight's gradient); a thread takes one
// after the other and does all of it, so that threads meet three times a step and never inside a product. Every number
// is summed by one thread in a fixed order: results do not depend on the number of threads.
//
// T is the type of activations, W that of weights and their gradients. Rows are grouped by expert; row i belongs to
// token[i]. Plain C++ on raw pointers, compiled at first use by nn/kernels/cpu.py.

#include "products.h"

namespace {

struct Sizes {
  int64_t experts, width, hidden;
};

// False for so few multiplications that waking threads costs more than they help.
bool worth_threads(const int64_t* count, Sizes s) {
  int64_t rows = 0;
  for (int64_t e = 0; e < s.experts; e++) rows += count[e];
  return rows * s.width * s.hidden > (1 << 21);
}

struct Task {
  int64_t expert, first, rows;
};

// Every expert's rows, in parts of at most kRows and nearly equal size.
std::vector<Task> cut(const int64_t* count, int64_t experts) {
  std::vector<Task> tasks;
  int64_t start = 0;
  for (int64_t e = 0; e < experts; start += count[e++]) {
    int64_t parts = (count[e] + kRows - 1) / kRows;
    for (int64_t p = 0; p < parts; p++) {
      int64_t first = count[e] * p / parts;
      tasks.push_back({e, start + first, count[e] * (p + 1) / parts - first});
    }
  }
  return tasks;
}

// act = silu(gate) * up * weight, where a row of gate_up holds gate then up.
template <class T>
void swiglu(const T* gate_up, const float* weight, T* act, int64_t rows, int64_t width) {
  for (int64_t i = 0; i < rows; i++) {
    const T *gate = gate_up + i * 2 * width, *up = gate + width;
    T* out = act + i * width;
    float w = weight[i];
#pragma omp simd
    for (int64_t j = 0; j < width; j++) {
      float g = load(gate[j]);
      store(out + j, g * sigmoid(g) * load(up[j]) * w);
    }
  }
}

// From d_act: the activation again (the down product's weight gradient needs it), d_gate_up and d_weight.
template <class T>
void swiglu_backward(const T* gate_up, const float* weight, const T* d_act, T* act, T* d_gate_up, float* d_weight,
                     int64_t rows, int64_t width) {
  for (int64_t i = 0; i < rows; i++) {
    const T *gate = gate_up + i * 2 * width, *up = gate + width, *d = d_act + i * width;
    T *out = act + i * width, *d_gate = d_gate_up + i * 2 * width, *d_up = d_gate + width;
    float w = weight[i], d_w = 0.0f;
#pragma omp simd reduction(+ : d_w)
    for (int64_t j = 0; j < width; j++) {
      float g = load(gate[j]), u = load(up[j]), da = load(d[j]);
      float s = sigmoid(g), silu = g * s, a = silu * u, dw = da * w;
      d_w += da * a;
      store(out + j, a * w);
      store(d_up + j, dw * silu);
      store(d_gate + j, dw * u * (s + silu * (1.0f - s)));
    }
    d_weight[i] = d_w;
  }
}

template <class T, class W>
void forward(const T* x, const int64_t* token, const float* weight, const int64_t* count, const W* gate_up,
             const W* down, T* gate_up_rows, T* out_rows, Sizes s) {
  std::vector<Task> tasks = cut(count, s.experts);
  int64_t hidden = s.hidden, width = s.width, both = 2 * hidden, number = tasks.size();
#pragma omp parallel if (worth_threads(count, s))
  {
    Scratch scratch;
    std::vector<T> act(kRows * hidden);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < number; i++) {
      auto [e, first, rows] = tasks[i];
      T* h = gate_up_rows + first * both;
      Operand<T> in = {x, width, token + first, false}, mid = {act.data(), hidden, nullptr, false};
      Operand<W> up = {gate_up + e * width * both, both, nullptr, true};
      Operand<W> back = {down + e * hidden * width, width, nullptr, true};
      product<T>(in, 0, rows, up, both, width, h, both, scratch);
      swiglu(h, weight + first, act.data(), rows, hidden);
      product<T>(mid, 0, rows, back, width, hidden, out_rows + first * width, width, scratch);
    }
  }
}

// Room for act_rows and d_gate_up_rows is the caller's; d_x_rows are rows to be combined per token.
template <class T, class W>
void backward(const T* x, const T* d_y, const int64_t* token, const float* weight, const int64_t* count,
              const W* gate_up, const W* down, const T* gate_up_rows, T* act_rows, T* d_gate_up_rows, T* d_x_rows,
              float* d_weight, W* d_gate_up, W* d_down, Sizes s) {
  std::vector<Task> tasks = cut(count, s.experts);
  int64_t hidden = s.hidden, width = s.width, both = 2 * hidden, number = tasks.size();
  std::vector<int64_t> start(s.experts + 1, 0);
  for (int64_t e = 0; e < s.experts; e++) start[e + 1] = start[e] + count[e];
  int64_t up_parts = (width + kRows - 1) / kRows, parts = up_parts + (hidden + kRows - 1) / kRows;
#pragma omp parallel if (worth_threads(count, s))
  {
    Scratch scratch;
    std::vector<T> d_act(kRows * hidden);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < number; i++) {
      auto [e, first, rows] = tasks[i];
      T *act = act_rows + first * hidden, *d_h = d_gate_up_rows + first * both;
      Operand<T> d_out = {d_y, width, token + first, false}, d_mid = {d_h, both, nullptr, false};
      Operand<W> down_t = {down + e * hidden * width, width, nullptr, false};
      Operand<W> up_t = {gate_up + e * width * both, both, nullptr, false};
      product<T>(d_out, 0, rows, down_t, hidden, width, d_act.data(), hidden, scratch);
      swiglu_backward(gate_up_rows + first * both, weight + first, d_act.data(), act, d_h, d_weight + first, rows,
                      hidden);
      product<T>(d_mid, 0, rows, up_t, width, both, d_x_rows + first * width, width, scratch);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < s.experts * parts; i++) {
      int64_t e = i / parts, part = i % parts, first = start[e], rows = count[e];
      bool is_up = part < up_parts;
      int64_t row = (is_up ? part : part - up_parts) * kRows, columns = is_up ? both : width;
      int64_t m = std::min(kRows, (is_up ? width : hidden) - row);
      W* out = (is_up ? d_gate_up + e * width * both : d_down + e * hidden * width) + row * columns;
      if (rows == 0) {
        std::memset(static_cast<void*>(out), 0, m * columns * sizeof(W));
        continue;
      }
      Operand<T> left = is_up ? Operand<T>{x, width, token + first, true}
                              : Operand<T>{act_rows + first * hidden, hidden, nullptr, true};
      Operand<T> right = is_up ? Operand<T>{d_gate_up_rows + first * both, both, nullptr, true}
                               : Operand<T>{d_y, width, token + first, true};
      product<T>(left, row, m, right, columns, rows, out, columns, scratch);
    }
  }
}

}  // namespace

#define EXPORT(name, T, W)                                                                                            \
  void forward_##name(const T* x, const int64_t* token, const float* w, const int64_t* count, const W* up,            \
                      const W* down, T* h, T* out, int64_t e, int64_t d, int64_t f) {                                 \
    forward<T, W>(x, token, w, count, up, down, h, out, {e, d, f});                                                   \
  }                                                                                                                   \
  void backward_##name(const T* x, const T* dy, const int64_t* token, const float* w, const int64_t* count,           \
                       const W* up, const W* down, const T* h, T* act, T* dh, T* dx, float* dw, W* dup, W* ddown,     \
                       int64_t e, int64_t d, int64_t f) {                                                             \
    backward<T, W>(x, dy, token, w, count, up, down, h, act, dh, dx, dw, dup, ddown, {e, d, f});                      \
  }

extern "C" {
EXPORT(f32_f32, float, float)
EXPORT(bf16_f32, bf16, float)
EXPORT(bf16_bf16, bf16, bf16)
int64_t multiplied_ns() { return multiplying_ns.load(); }
}
