// The weighted sum of each token's rows, and its backward pass.
#pragma once

#include "hd.cuh"

namespace hecate {

// out[t] = sum over j, ascending, of weights[t, j] * rows[inverse[t, j]], in float32, cast once.
struct CombineArgs {
  const void* rows;  // [rows, width], contiguous
  const i64* inverse;    // [tokens, top_k]; outside [0, present): adds nothing
  const float* weights;  // [tokens, top_k], or null: all 1
  void* out;             // [tokens, width], contiguous
  i64 tokens, top_k, width, present;
  const void* own;  // rows r in [own_begin, own_end) are own[own_index[r - own_begin]], in the dtype of `out`
  const i64* own_index;
  i64 own_begin, own_end;
  i64 aligned;
};

template <typename In, typename Out>
struct Combine {
  using Args = CombineArgs;
  static constexpr int kSize = Lanes<In, Out>::value;

  // Adds the products of one group of columns to `sum`.
  template <int kCount, typename From>
  static HECATE_HD void add_row(const From* row, float weight, bool weighted, float* sum) {
    const Pack<From, kCount> in = load<kCount>(row);
    for (int i = 0; i < kCount; ++i) {
      const float value = widen(in.at[i]);
      sum[i] = add(sum[i], weighted ? mul(value, weight) : value);
    }
  }

  template <int kCount>
  static HECATE_HD void columns(const Args& a, i64 t, i64 column) {
    float sum[kCount];
    for (int i = 0; i < kCount; ++i) sum[i] = 0.0f;
    for (i64 j = 0; j < a.top_k; ++j) {
      const i64 row = a.inverse[t * a.top_k + j];
      if (row < 0 || row >= a.present) continue;
      const float weight = a.weights ? a.weights[t * a.top_k + j] : 1.0f;
      if (row >= a.own_begin && row < a.own_end)
        add_row<kCount>(static_cast<const Out*>(a.own) + a.own_index[row - a.own_begin] * a.width + column, weight,
                        a.weights != nullptr, sum);
      else
        add_row<kCount>(static_cast<const In*>(a.rows) + row * a.width + column, weight, a.weights != nullptr, sum);
    }
    Pack<Out, kCount> value;
    for (int i = 0; i < kCount; ++i) value.at[i] = narrow<Out>(sum[i]);
    store<kCount>(static_cast<Out*>(a.out) + t * a.width + column, value);
  }

  template <typename Block>
  static HECATE_HD void run(const Args& a, Block& block) {
    block.run([&](int x, int y) {
      for (i64 t = block.index() * block.height() + y; t < a.tokens; t += block.count() * block.height())
        each_column<kSize>(
            a.width, a.aligned, x, block.width(), [&](i64 column) { columns<kSize>(a, t, column); },
            [&](i64 column) { columns<1>(a, t, column); });
    });
  }
};

// For each copy with row r = inverse[t, j]: grad_rows[r] = cast(weights[t, j] * grad[t]), and
// grad_weights[t, j] = the float32 dot product of grad[t] and rows[r].
struct CombineBackwardArgs {
  const void* grad;      // [tokens, width], row stride `grad_stride`
  i64 grad_stride;
  const void* rows;      // [rows, width], contiguous, as they were combined
  const i64* inverse;    // [tokens, top_k]; outside [0, present): no row, and no gradient of its weight
  const float* weights;  // [tokens, top_k]
  void* grad_rows;       // [rows, width], contiguous, dtype of `rows`; null: not wanted
  float* grad_weights;   // [tokens, top_k]; null: not wanted
  i64 tokens, top_k, width, present;
  i64 aligned;
};

constexpr int kChoices = 8;  // of a token, that are summed over the columns at a time

// Shared memory: kChoices numbers of 4 bytes per thread. The width of the block is a power of two.
template <typename In, typename Out>
struct CombineBackward {
  using Args = CombineBackwardArgs;
  static constexpr int kSize = Lanes<In, Out>::value;

  template <int kCount>
  static HECATE_HD float columns(const Args& a, const Out* grad, i64 row, float weight, i64 column) {
    const Pack<Out, kCount> from = load<kCount>(grad + column);
    if (a.grad_rows != nullptr) {
      Pack<In, kCount> value;
      for (int i = 0; i < kCount; ++i) value.at[i] = narrow<In>(mul(weight, widen(from.at[i])));
      store<kCount>(static_cast<In*>(a.grad_rows) + row * a.width + column, value);
    }
    float sum = 0.0f;
    if (a.grad_weights != nullptr) {
      const Pack<In, kCount> with = load<kCount>(static_cast<const In*>(a.rows) + row * a.width + column);
      for (int i = 0; i < kCount; ++i) sum = fused_mul_add(widen(from.at[i]), widen(with.at[i]), sum);
    }
    return sum;
  }

  // Writes the gradient of this thread's columns; returns their part of the dot product.
  static HECATE_HD float part(const Args& a, i64 t, i64 j, int x, int threads) {
    const i64 row = a.inverse[t * a.top_k + j];
    float sum = 0.0f;
    if (row < 0 || row >= a.present) return sum;
    const Out* grad = static_cast<const Out*>(a.grad) + t * a.grad_stride;
    const float weight = a.weights[t * a.top_k + j];
    each_column<kSize>(
        a.width, a.aligned, x, threads,
        [&](i64 column) { sum = add(sum, columns<kSize>(a, grad, row, weight, column)); },
        [&](i64 column) { sum = add(sum, columns<1>(a, grad, row, weight, column)); });
    return sum;
  }

  template <typename Block>
  static HECATE_HD void run(const Args& a, Block& block) {
    float* parts = reinterpret_cast<float*>(block.shared());  // [kChoices, height, width]
    const int width = block.width(), threads = block.threads();
    for (i64 t0 = block.index() * block.height(); t0 < a.tokens; t0 += block.count() * block.height()) {
      for (i64 j0 = 0; j0 < a.top_k; j0 += kChoices) {
        const int choices = static_cast<int>(smaller<i64>(kChoices, a.top_k - j0));
        block.run([&](int x, int y) {
          for (int c = 0; c < choices; ++c)
            parts[c * threads + y * width + x] = t0 + y < a.tokens ? part(a, t0 + y, j0 + c, x, width) : 0.0f;
        });
        if (a.grad_weights == nullptr) continue;
        for (int half = width / 2; half > 0; half /= 2) {
          block.sync();
          block.run([&](int x, int y) {
            if (x >= half) return;
            float* mine = parts + y * width + x;
            for (int c = 0; c < choices; ++c) mine[c * threads] = add(mine[c * threads], mine[c * threads + half]);
          });
        }
        block.run([&](int x, int y) {
          if (x > 0 || t0 + y >= a.tokens) return;
          for (int c = 0; c < choices; ++c)
            a.grad_weights[(t0 + y) * a.top_k + j0 + c] = parts[c * threads + y * width];
        });
        block.sync();
      }
    }
  }
};

#define HECATE_COMBINE(ENTRY)                                                     \
  ENTRY(combine_f32_f32, hecate::Combine<float, float>)                           \
  ENTRY(combine_bf16_bf16, hecate::Combine<hecate::Bf16, hecate::Bf16>)           \
  ENTRY(combine_f16_f16, hecate::Combine<hecate::F16, hecate::F16>)               \
  ENTRY(combine_bf16_f32, hecate::Combine<hecate::Bf16, float>)                   \
  ENTRY(combine_f16_f32, hecate::Combine<hecate::F16, float>)                     \
  ENTRY(combine_backward_f32_f32, hecate::CombineBackward<float, float>)          \
  ENTRY(combine_backward_bf16_bf16, hecate::CombineBackward<hecate::Bf16, hecate::Bf16>) \
  ENTRY(combine_backward_f16_f16, hecate::CombineBackward<hecate::F16, hecate::F16>)     \
  ENTRY(combine_backward_bf16_f32, hecate::CombineBackward<hecate::Bf16, float>)  \
  ENTRY(combine_backward_f16_f32, hecate::CombineBackward<hecate::F16, float>)

}  // namespace hecate
