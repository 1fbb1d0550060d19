// Rows of experts, all weight kinds in one launch: owned rows into a stack of chunks, and gradients of chunks into the
// owner's rows.
#pragma once

#include "hd.cuh"

namespace hecate {

constexpr int kKinds = 16;      // weight kinds per launch
constexpr i64 kPiece = 16384;  // elements that a block takes at a time

// Where each weight kind lies in its own tensor and in a chunk.
struct Kinds {
  i64 count;
  i64 tensor[kKinds];   // address of the first row
  i64 stride[kKinds];   // elements between rows of the tensor
  i64 offset[kKinds];   // of the kind in a chunk
  i64 numel[kKinds];    // elements of the kind per expert
  i64 aligned[kKinds];  // whether all rows, in tensor and chunks, begin at a multiple of 16 bytes
};

// Calls `piece(row, kind, begin, end)` for this block's pieces of all rows: elements [begin, end) of the kind.
template <typename Block, typename Piece>
HECATE_HD void each_piece(const Kinds& kinds, i64 rows, Block& block, Piece piece) {
  i64 per_row = 0;
  for (i64 k = 0; k < kinds.count; ++k) per_row += (kinds.numel[k] + kPiece - 1) / kPiece;
  for (i64 unit = block.index(); unit < rows * per_row; unit += block.count()) {
    i64 left = unit % per_row, kind = 0;
    for (; left >= (kinds.numel[kind] + kPiece - 1) / kPiece; ++kind) left -= (kinds.numel[kind] + kPiece - 1) / kPiece;
    piece(unit / per_row, kind, left * kPiece, smaller((left + 1) * kPiece, kinds.numel[kind]));
  }
}

// chunks[r, offset[k] : offset[k] + numel[k]] = cast(tensor[k][from[r]]); padding between the kinds is not written.
struct PackArgs {
  const i64* from;  // [rows], row of each tensor; null: row r
  void* chunks;     // [rows, chunk], row stride `chunk_stride`
  i64 chunk_stride, rows;
  Kinds kinds;
};

template <typename In, typename Out>
struct PackRows {
  using Args = PackArgs;
  static constexpr int kSize = Lanes<In, Out>::value;

  template <typename Block>
  static HECATE_HD void run(const Args& a, Block& block) {
    const Kinds& kinds = a.kinds;
    const int threads = block.threads();
    each_piece(kinds, a.rows, block, [&](i64 row, i64 kind, i64 begin, i64 end) {
      const i64 source = a.from == nullptr ? row : a.from[row];
      const In* in = reinterpret_cast<const In*>(kinds.tensor[kind]) + source * kinds.stride[kind] + begin;
      Out* out = static_cast<Out*>(a.chunks) + row * a.chunk_stride + kinds.offset[kind] + begin;
      block.run([&](int x, int y) {
        each_column<kSize>(
            end - begin, kinds.aligned[kind], y * block.width() + x, threads,
            [&](i64 i) {
              const Pack<In, kSize> from = load<kSize>(in + i);
              Pack<Out, kSize> value;
              for (int n = 0; n < kSize; ++n) value.at[n] = Cast<Out, In>::of(from.at[n]);
              store<kSize>(out + i, value);
            },
            [&](i64 i) { out[i] = Cast<Out, In>::of(in[i]); });
      });
    });
  }
};

// tensor[k][to[r]] += scale * (sum of the contributions to row r), or = if `overwrite`. The sum has the order of
// hecate/collectives/summation.py: the ranks of a node ascending, then the nodes ascending, in float32 (float64 for
// float64). Sources may be in the memory of other devices.
struct AccumulateArgs {
  const i64* to;      // [rows], row of each tensor
  const i64* first;   // [rows + 1]: contributions [first[r], first[r + 1]) belong to row r
  const i64* source;  // [contributions], addresses of chunks, ascending rank
  const i64* node;    // [contributions], node of the rank
  i64 rows, overwrite;
  double scale;
  Kinds kinds;
};

template <typename In, typename Sum = float>
struct Accumulate {
  using Args = AccumulateArgs;
  static constexpr int kSize = Lanes<In, Sum>::value;

  template <int kCount>
  static HECATE_HD void columns(const Args& a, i64 row, i64 at, Sum* out) {
    Sum total[kCount] = {}, partial[kCount] = {};
    const i64 begin = a.first[row], end = a.first[row + 1];
    bool closed = false;  // whether `total` has a node's sum
    const auto close_node = [&] {
      for (int i = 0; i < kCount; ++i) total[i] = closed ? add(total[i], partial[i]) : partial[i];
      closed = true;
    };
    for (i64 c = begin; c < end; ++c) {
      const Pack<In, kCount> in = load<kCount>(reinterpret_cast<const In*>(a.source[c]) + at);
      const bool opens = c == begin || a.node[c] != a.node[c - 1];
      if (opens && c > begin) close_node();
      for (int i = 0; i < kCount; ++i) partial[i] = opens ? widen(in.at[i]) : add(partial[i], widen(in.at[i]));
    }
    if (begin == end) return;
    close_node();
    Pack<Sum, kCount> value;
    if (a.overwrite)
      for (int i = 0; i < kCount; ++i) value.at[i] = static_cast<Sum>(-0.0);  // x + -0 is x, also if x is -0
    else
      value = load<kCount>(out);
    for (int i = 0; i < kCount; ++i)
      value.at[i] = fused_mul_add(static_cast<Sum>(a.scale), total[i], value.at[i]);
    store<kCount>(out, value);
  }

  template <typename Block>
  static HECATE_HD void run(const Args& a, Block& block) {
    const Kinds& kinds = a.kinds;
    each_piece(kinds, a.rows, block, [&](i64 row, i64 kind, i64 begin, i64 end) {
      Sum* out = reinterpret_cast<Sum*>(kinds.tensor[kind]) + a.to[row] * kinds.stride[kind] + begin;
      const i64 at = kinds.offset[kind] + begin;
      block.run([&](int x, int y) {
        each_column<kSize>(
            end - begin, kinds.aligned[kind], y * block.width() + x, block.threads(),
            [&](i64 i) { columns<kSize>(a, row, at + i, out + i); },
            [&](i64 i) { columns<1>(a, row, at + i, out + i); });
      });
    });
  }
};

#define HECATE_STACK(ENTRY)                                          \
  ENTRY(pack_1, hecate::PackRows<hecate::u8, hecate::u8>)            \
  ENTRY(pack_2, hecate::PackRows<hecate::u16, hecate::u16>)          \
  ENTRY(pack_4, hecate::PackRows<hecate::u32, hecate::u32>)          \
  ENTRY(pack_8, hecate::PackRows<hecate::i64, hecate::i64>)          \
  ENTRY(pack_f32_bf16, hecate::PackRows<float, hecate::Bf16>)        \
  ENTRY(pack_f32_f16, hecate::PackRows<float, hecate::F16>)          \
  ENTRY(pack_bf16_f32, hecate::PackRows<hecate::Bf16, float>)        \
  ENTRY(pack_f16_f32, hecate::PackRows<hecate::F16, float>)          \
  ENTRY(accumulate_f64, hecate::Accumulate<double, double>)          \
  ENTRY(accumulate_f32, hecate::Accumulate<float>)                   \
  ENTRY(accumulate_bf16, hecate::Accumulate<hecate::Bf16>)           \
  ENTRY(accumulate_f16, hecate::Accumulate<hecate::F16>)

}  // namespace hecate
