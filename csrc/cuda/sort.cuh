// Tokens per expert, and the order of token copies by (destination, expert): a stable counting sort in two launches,
// without atomics in global memory on which the order could depend.
//
// Copies are cut into tiles, one per block. The first launch counts each tile; in the second a block knows from these
// counts how many copies of each expert come before its own.
#pragma once

#include "hd.cuh"

namespace hecate {

// Two bins follow those of the experts: numbers that are no expert, and -1, which means none.
constexpr i64 kOtherBins = 2;
HECATE_HD i64 bin_of(i64 expert, i64 experts) {
  if (expert == -1) return experts + 1;
  return expert >= 0 && expert < experts ? expert : experts;
}

struct CountArgs {
  const i64* index;  // [copies]
  u32* tiles;        // [blocks, experts + 2]: copies in each bin in the tile of each block
  i64* counts;       // [experts + 2]: the sums over the tiles
  u32* finished;     // blocks that have finished; 0 before and after
  i64 copies, tile, experts;
};

// Shared memory: experts + 3 numbers of 4 bytes.
struct Count {
  using Args = CountArgs;

  template <typename Block>
  static HECATE_HD void run(const Args& a, Block& block) {
    u32* bins = reinterpret_cast<u32*>(block.shared());
    u32* is_last = bins + a.experts + kOtherBins;
    const i64 begin = block.index() * a.tile, end = smaller(begin + a.tile, a.copies);
    const i64 bin_count = a.experts + kOtherBins;
    const int width = block.width(), threads = block.threads();

    block.run([&](int x, int y) {
      for (i64 e = y * width + x; e < bin_count; e += threads) bins[e] = 0;
    });
    block.sync();
    block.run([&](int x, int y) {
      for (i64 i = begin + y * width + x; i < end; i += threads)
        atomic_add(&bins[bin_of(a.index[i], a.experts)], 1u);
    });
    block.sync();
    block.run([&](int x, int y) {
      for (i64 e = y * width + x; e < bin_count; e += threads) a.tiles[block.index() * bin_count + e] = bins[e];
      block.fence();
    });
    block.sync();
    block.run([&](int x, int y) {
      if (x == 0 && y == 0) *is_last = atomic_add(a.finished, 1u) == static_cast<u32>(block.count() - 1);
    });
    block.sync();
    if (!*is_last) return;
    block.run([&](int x, int y) {
      block.fence();
      for (i64 e = y * width + x; e < bin_count; e += threads) {
        i64 sum = 0;  // volatile: other blocks wrote these, past this processor's cache
        for (i64 b = 0; b < block.count(); ++b) sum += static_cast<const volatile u32*>(a.tiles)[b * bin_count + e];
        a.counts[e] = sum;
      }
      if (x == 0 && y == 0) *a.finished = 0;
    });
  }
};

struct SortArgs {
  const i64* index;   // [copies]
  const u32* tiles;   // [blocks, experts + 2], from the launch that counted
  const i64* first;   // [experts + 1]: the holders of expert e have the numbers [first[e], first[e + 1])
  const i64* before;  // [holders]: copies of the expert that go to its holders before this one
  const i64* start;   // [holders]: first row that goes to this holder of this expert
  i64* order;         // [rows]: copy that is sent as this row
  i64* inverse;       // [copies]: row of this copy; -1: it has no expert
  i64 copies, tile, experts, rows;
  i64 walkers;  // threads that walk through a tile, each through a segment of its own
};

// Shared memory: experts * (walkers + 1) numbers of 4 bytes, then `tile` numbers of 2 bytes.
struct Sort {
  using Args = SortArgs;
  static constexpr u16 kNone = 0xffff;

  // The row of the copy that comes at place `rank` among this expert's copies.
  static HECATE_HD i64 row_of(const Args& a, i64 expert, i64 rank) {
    i64 holder = a.first[expert];
    while (holder + 1 < a.first[expert + 1] && rank >= a.before[holder + 1]) ++holder;
    return a.start[holder] + rank - a.before[holder];
  }

  template <typename Block>
  static HECATE_HD void run(const Args& a, Block& block) {
    u32* ranks = reinterpret_cast<u32*>(block.shared());  // [experts, walkers]
    u32* base = ranks + a.experts * a.walkers;            // [experts]
    u16* key = reinterpret_cast<u16*>(base + a.experts);  // [tile]
    const i64 begin = block.index() * a.tile, size = smaller(a.tile, a.copies - begin);
    const i64 segment = (a.tile + a.walkers - 1) / a.walkers;
    const int width = block.width(), threads = block.threads();

    block.run([&](int x, int y) {
      const int thread = y * width + x;
      for (i64 i = thread; i < a.experts * a.walkers; i += threads) ranks[i] = 0;
      for (i64 i = thread; i < size; i += threads) {
        const i64 bin = bin_of(a.index[begin + i], a.experts);
        key[i] = bin < a.experts ? static_cast<u16>(bin) : kNone;
      }
      for (i64 e = thread; e < a.experts; e += threads) {
        u32 sum = 0;
        for (i64 b = 0; b < block.index(); ++b) sum += a.tiles[b * (a.experts + kOtherBins) + e];
        base[e] = sum;
      }
    });
    block.sync();
    block.run([&](int x, int y) {
      const i64 walker = y * width + x;
      if (walker >= a.walkers) return;
      for (i64 i = walker * segment; i < smaller((walker + 1) * segment, size); ++i)
        if (key[i] != kNone) ++ranks[key[i] * a.walkers + walker];
    });
    block.sync();
    block.run([&](int x, int y) {
      for (i64 e = y * width + x; e < a.experts; e += threads) {
        u32 sum = base[e];
        for (i64 w = 0; w < a.walkers; ++w) {
          const u32 mine = ranks[e * a.walkers + w];
          ranks[e * a.walkers + w] = sum;
          sum += mine;
        }
      }
    });
    block.sync();
    block.run([&](int x, int y) {
      const i64 walker = y * width + x;
      if (walker >= a.walkers) return;
      for (i64 i = walker * segment; i < smaller((walker + 1) * segment, size); ++i) {
        i64 row = -1;
        if (key[i] != kNone) row = row_of(a, key[i], ranks[key[i] * a.walkers + walker]++);
        if (row >= a.rows) row = -1;  // the holders' shares and the index disagree: out of bounds
        a.inverse[begin + i] = row;
        if (row >= 0) a.order[row] = begin + i;
      }
    });
  }
};

#define HECATE_SORT(ENTRY)     \
  ENTRY(count, hecate::Count) \
  ENTRY(sort, hecate::Sort)

}  // namespace hecate
