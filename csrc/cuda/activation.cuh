// Activations on the rows of a grouped product, plain or gated, forward and backward.
//
// The steps round as PyTorch's would: the activation is rounded to the dtype of the rows before it is multiplied with
// the gated half.
#pragma once

#include "hd.cuh"

namespace hecate {

enum Activation : i64 { kSilu, kGelu, kGeluTanh, kRelu, kReluSquared };

HECATE_HD float exponential(float x) {
#ifdef __CUDA_ARCH__
  return expf(x);
#else
  return __builtin_expf(x);
#endif
}

HECATE_HD float error_function(float x) {
#ifdef __CUDA_ARCH__
  return erff(x);
#else
  return __builtin_erff(x);
#endif
}

HECATE_HD float hyperbolic_tangent(float x) {
#ifdef __CUDA_ARCH__
  return tanhf(x);
#else
  return __builtin_tanhf(x);
#endif
}

constexpr float kSqrtHalf = 0.70710678118654752f;          // sqrt(1/2)
constexpr float kInvSqrtTwoPi = 0.39894228040143268f;      // 1 / sqrt(2 pi)
constexpr float kSqrtTwoOverPi = 0.79788456080286536f;     // sqrt(2 / pi)
constexpr float kGeluCubic = 0.044715f;

HECATE_HD float activation(i64 kind, float x) {
  if (kind == kSilu) return x / (1.0f + exponential(-x));
  if (kind == kGelu) return 0.5f * x * (1.0f + error_function(x * kSqrtHalf));
  if (kind == kGeluTanh) return 0.5f * x * (1.0f + hyperbolic_tangent(kSqrtTwoOverPi * (x + kGeluCubic * x * x * x)));
  const float positive = x < 0.0f ? 0.0f : x;  // a NaN stays one
  return kind == kRelu ? positive : positive * positive;
}

// The derivative of `activation` at x.
HECATE_HD float slope(i64 kind, float x) {
  if (kind == kSilu) {
    const float sigmoid = 1.0f / (1.0f + exponential(-x));
    return sigmoid * (1.0f + x * (1.0f - sigmoid));
  }
  if (kind == kGelu) {
    const float below = 0.5f * (1.0f + error_function(x * kSqrtHalf));
    return below + x * kInvSqrtTwoPi * exponential(-0.5f * x * x);
  }
  if (kind == kGeluTanh) {
    const float tangent = hyperbolic_tangent(kSqrtTwoOverPi * (x + kGeluCubic * x * x * x));
    const float inner = kSqrtTwoOverPi * (1.0f + 3.0f * kGeluCubic * x * x);
    return 0.5f * (1.0f + tangent) + 0.5f * x * (1.0f - tangent * tangent) * inner;
  }
  if (kind == kRelu) return x > 0.0f ? 1.0f : 0.0f;
  return x > 0.0f ? 2.0f * x : 0.0f;
}

// out[n, c] = act(x[n, c]) plain, or act(x[n, c]) * x[n, width + c] gated.
struct ActivateArgs {
  const void* x;  // [rows, width], gated [rows, 2 * width]; row stride `x_stride`
  i64 x_stride;
  void* out;  // [rows, width], contiguous
  i64 rows, width;
  i64 kind, gated, aligned;
};

template <typename T>
struct Activate {
  using Args = ActivateArgs;
  static constexpr int kSize = Lanes<T>::value;

  template <int kCount>
  static HECATE_HD void columns(const Args& a, const T* x, T* out) {
    const Pack<T, kCount> gate = load<kCount>(x);
    Pack<T, kCount> value;
    for (int i = 0; i < kCount; ++i) value.at[i] = narrow<T>(activation(a.kind, widen(gate.at[i])));
    if (a.gated) {
      const Pack<T, kCount> up = load<kCount>(x + a.width);
      for (int i = 0; i < kCount; ++i) value.at[i] = narrow<T>(mul(widen(value.at[i]), widen(up.at[i])));
    }
    store<kCount>(out, value);
  }

  template <typename Block>
  static HECATE_HD void run(const Args& a, Block& block) {
    block.run([&](int x, int y) {
      for (i64 n = block.index() * block.height() + y; n < a.rows; n += block.count() * block.height()) {
        const T* in = static_cast<const T*>(a.x) + n * a.x_stride;
        T* out = static_cast<T*>(a.out) + n * a.width;
        each_column<kSize, 1>(
            a.width, a.aligned, x, block.width(), [&](i64 c) { columns<kSize>(a, in + c, out + c); },
            [&](i64 c) { columns<1>(a, in + c, out + c); });
      }
    });
  }
};

struct ActivateBackwardArgs {
  const void* grad;  // [rows, width], row stride `grad_stride`
  i64 grad_stride;
  const void* x;  // as forward
  i64 x_stride;
  void* grad_x;  // shape of x, contiguous
  i64 rows, width;
  i64 kind, gated, aligned;
};

template <typename T>
struct ActivateBackward {
  using Args = ActivateBackwardArgs;
  static constexpr int kSize = Lanes<T>::value;

  template <int kCount>
  static HECATE_HD void columns(const Args& a, const T* grad, const T* x, T* grad_x) {
    const Pack<T, kCount> outer = load<kCount>(grad), gate = load<kCount>(x);
    Pack<T, kCount> inner = outer;  // gradient of the activation
    if (a.gated) {
      const Pack<T, kCount> up = load<kCount>(x + a.width);
      Pack<T, kCount> grad_up;
      for (int i = 0; i < kCount; ++i) {
        const T active = narrow<T>(activation(a.kind, widen(gate.at[i])));
        grad_up.at[i] = narrow<T>(mul(widen(outer.at[i]), widen(active)));
        inner.at[i] = narrow<T>(mul(widen(outer.at[i]), widen(up.at[i])));
      }
      store<kCount>(grad_x + a.width, grad_up);
    }
    Pack<T, kCount> value;
    for (int i = 0; i < kCount; ++i)
      value.at[i] = narrow<T>(mul(widen(inner.at[i]), slope(a.kind, widen(gate.at[i]))));
    store<kCount>(grad_x, value);
  }

  template <typename Block>
  static HECATE_HD void run(const Args& a, Block& block) {
    block.run([&](int x, int y) {
      for (i64 n = block.index() * block.height() + y; n < a.rows; n += block.count() * block.height()) {
        const T* grad = static_cast<const T*>(a.grad) + n * a.grad_stride;
        const T* in = static_cast<const T*>(a.x) + n * a.x_stride;
        T* grad_x = static_cast<T*>(a.grad_x) + n * a.width * (a.gated ? 2 : 1);
        each_column<kSize, 1>(
            a.width, a.aligned, x, block.width(), [&](i64 c) { columns<kSize>(a, grad + c, in + c, grad_x + c); },
            [&](i64 c) { columns<1>(a, grad + c, in + c, grad_x + c); });
      }
    });
  }
};

#define HECATE_ACTIVATION(ENTRY)                                            \
  ENTRY(activate_f32, hecate::Activate<float>)                              \
  ENTRY(activate_bf16, hecate::Activate<hecate::Bf16>)                      \
  ENTRY(activate_f16, hecate::Activate<hecate::F16>)                        \
  ENTRY(activate_backward_f32, hecate::ActivateBackward<float>)             \
  ENTRY(activate_backward_bf16, hecate::ActivateBackward<hecate::Bf16>)     \
  ENTRY(activate_backward_f16, hecate::ActivateBackward<hecate::F16>)

}  // namespace hecate
