// Rows of tokens into the send buffer, and received rows into the order of the experts; cast on the way.
#pragma once

#include "hd.cuh"

namespace hecate {

// out[inverse[t * top_k + j]] = cast(x[t]): reads each token once and writes its copies straight in wire order.
struct ScatterArgs {
  const void* x;  // [tokens, width], row stride `x_stride`
  i64 x_stride;
  const i64* inverse;  // [tokens, top_k], row of `out`; outside [0, rows): this copy has no expert
  void* out;           // [rows, width], contiguous
  i64 tokens, top_k, width, rows;
  i64 skip_begin, skip_end;  // rows of `out` that are not written: they stay on this device
  i64 aligned;               // whether all rows begin at a multiple of 16 bytes
};

template <typename In, typename Out>
struct Scatter {
  using Args = ScatterArgs;
  static constexpr int kSize = Lanes<In, Out>::value;

  template <typename Value>
  static HECATE_HD void write(const Args& a, const i64* to, i64 column, const Value& value, Out* out) {
    for (i64 j = 0; j < a.top_k; ++j) {
      const i64 row = to[j];
      if (row < 0 || row >= a.rows || (row >= a.skip_begin && row < a.skip_end)) continue;
      *reinterpret_cast<Value*>(out + row * a.width + column) = value;
    }
  }

  template <typename Block>
  static HECATE_HD void run(const Args& a, Block& block) {
    block.run([&](int x, int y) {
      Out* out = static_cast<Out*>(a.out);
      for (i64 t = block.index() * block.height() + y; t < a.tokens; t += block.count() * block.height()) {
        const In* row = static_cast<const In*>(a.x) + t * a.x_stride;
        const i64* to = a.inverse + t * a.top_k;
        each_column<kSize>(
            a.width, a.aligned, x, block.width(),
            [&](i64 column) {
              const Pack<In, kSize> in = load<kSize>(row + column);
              Pack<Out, kSize> value;
              for (int i = 0; i < kSize; ++i) value.at[i] = Cast<Out, In>::of(in.at[i]);
              write(a, to, column, value, out);
            },
            [&](i64 column) { write(a, to, column, Cast<Out, In>::of(row[column]), out); });
      }
    });
  }
};

// out[q] = cast(x[order[q]]), except that rows of x in [own_begin, own_end), which never left this device, are read
// from `own` in the dtype of `out`.
struct GatherArgs {
  const void* x;  // rows as received, row stride `x_stride`
  i64 x_stride;
  const i64* order;  // [rows], row of `x`
  void* out;         // [rows, width], contiguous
  i64 rows, width;
  const void* own;  // received row r is own[own_index[r - own_begin] / top_k]
  i64 own_stride;
  const i64* own_index;
  i64 own_begin, own_end, top_k;
  i64 aligned;
};

template <typename In, typename Out>
struct Gather {
  using Args = GatherArgs;
  static constexpr int kSize = Lanes<In, Out>::value;

  template <typename From>
  static HECATE_HD void copy(const From* __restrict__ row, Out* __restrict__ out, i64 width, bool aligned, int x,
                             int threads) {
    each_column<kSize>(
        width, aligned, x, threads,
        [&](i64 column) {
          const Pack<From, kSize> in = load<kSize>(row + column);
          Pack<Out, kSize> value;
          for (int i = 0; i < kSize; ++i) value.at[i] = Cast<Out, From>::of(in.at[i]);
          store<kSize>(out + column, value);
        },
        [&](i64 column) { out[column] = Cast<Out, From>::of(row[column]); });
  }

  template <typename Block>
  static HECATE_HD void run(const Args& a, Block& block) {
    block.run([&](int x, int y) {
      for (i64 q = block.index() * block.height() + y; q < a.rows; q += block.count() * block.height()) {
        const i64 from = a.order[q];
        Out* out = static_cast<Out*>(a.out) + q * a.width;
        if (from >= a.own_begin && from < a.own_end) {
          const i64 token = a.own_index[from - a.own_begin] / a.top_k;
          copy(static_cast<const Out*>(a.own) + token * a.own_stride, out, a.width, a.aligned, x, block.width());
        } else {
          copy(static_cast<const In*>(a.x) + from * a.x_stride, out, a.width, a.aligned, x, block.width());
        }
      }
    });
  }
};

// Rows that are not cast are copied by the size of an element, whatever the dtype.
#define HECATE_PERMUTE(ENTRY)                      \
  ENTRY(scatter_1, hecate::Scatter<hecate::u8, hecate::u8>)       \
  ENTRY(scatter_2, hecate::Scatter<hecate::u16, hecate::u16>)     \
  ENTRY(scatter_4, hecate::Scatter<hecate::u32, hecate::u32>)     \
  ENTRY(scatter_8, hecate::Scatter<hecate::i64, hecate::i64>)     \
  ENTRY(scatter_f32_bf16, hecate::Scatter<float, hecate::Bf16>)   \
  ENTRY(scatter_f32_f16, hecate::Scatter<float, hecate::F16>)     \
  ENTRY(scatter_bf16_f32, hecate::Scatter<hecate::Bf16, float>)   \
  ENTRY(scatter_f16_f32, hecate::Scatter<hecate::F16, float>)     \
  ENTRY(gather_1, hecate::Gather<hecate::u8, hecate::u8>)         \
  ENTRY(gather_2, hecate::Gather<hecate::u16, hecate::u16>)       \
  ENTRY(gather_4, hecate::Gather<hecate::u32, hecate::u32>)       \
  ENTRY(gather_8, hecate::Gather<hecate::i64, hecate::i64>)       \
  ENTRY(gather_f32_bf16, hecate::Gather<float, hecate::Bf16>)     \
  ENTRY(gather_f32_f16, hecate::Gather<float, hecate::F16>)       \
  ENTRY(gather_bf16_f32, hecate::Gather<hecate::Bf16, float>)     \
  ENTRY(gather_f16_f32, hecate::Gather<hecate::F16, float>)

}  // namespace hecate
