// The smallest maximum device load that a placement allows, by maximum flows.
#pragma once

#include "quota_memory.cuh"

namespace hecate {

template <typename Block>
struct MinMax : QuotaMemory<Block> {
  using Memory = QuotaMemory<Block>;
  using Memory::a, Memory::all, Memory::alone, Memory::read, Memory::holders, Memory::scalar;
  using Memory::load, Memory::amount, Memory::level, Memory::expert_seen, Memory::pointer, Memory::inner, Memory::path;

  HECATE_HD MinMax(const QuotaArgs& args, Block& on) : Memory(args, on) {}

  HECATE_HD void split_evenly() {
    all(a.devices, [&](i64 d) { load[d] = 0; });
    all(a.experts, [&](i64 e) {
      i64 left = 0;
      for (i64 s = 0; s < a.devices; ++s) left += a.counts[s * a.experts + e];
      for (i64 p = a.first[e]; p < a.first[e + 1]; ++p) {
        amount[p] = left / (a.first[e + 1] - p);
        left -= amount[p];
        atomic_add(&load[a.device[p]], amount[p]);
      }
    });
  }

  // Breadth-first search from all devices above `target`; returns whether it reached one below.
  HECATE_HD bool levels(i64 target) {
    all(a.experts, [&](i64 e) { expert_seen[e] = -1; });
    all(a.devices, [&](i64 d) { level[d] = load[d] > target ? 0 : -1; });
    for (i64 depth = 0;; ++depth) {
      alone([&] { scalar[kAgain] = 0; });
      all(a.pairs, [&](i64 p) {
        if (level[a.device[p]] == depth && amount[p] > 0 && holders(a.expert[p]) > 1 && expert_seen[a.expert[p]] < 0)
          expert_seen[a.expert[p]] = depth;
      });
      all(a.pairs, [&](i64 p) {
        if (expert_seen[a.expert[p]] != depth || level[a.device[p]] >= 0) return;
        level[a.device[p]] = depth + 1;
        scalar[kAgain] = 1;
      });
      if (read(kAgain) == 0) break;
    }
    alone([&] { scalar[kAgain] = 0; });
    all(a.devices, [&](i64 d) {
      if (level[d] >= 0 && load[d] < target) scalar[kAgain] = 1;
    });
    return read(kAgain) != 0;
  }

  // Moves the pointers of device d on to an edge to the next level; false if there is none.
  HECATE_HD bool next_edge(i64 d) {
    for (; pointer[d] < a.device_first[d + 1]; ++pointer[d], inner[d] = 0) {
      const i64 p = a.device_pairs[pointer[d]], e = a.expert[p];
      if (amount[p] == 0) continue;
      for (; inner[d] < holders(e); ++inner[d])
        if (level[a.device[a.first[e] + inner[d]]] == level[d] + 1) return true;
    }
    return false;
  }

  // Walks from `source`, which is above `target`, to a device below it; returns the length of the path, or -1.
  HECATE_HD i64 walk(i64 source, i64 target) {
    i64 depth = 0;
    path[0] = source;
    while (load[path[depth]] >= target) {
      const i64 d = path[depth];
      if (next_edge(d)) {
        path[++depth] = a.device[a.first[a.expert[a.device_pairs[pointer[d]]]] + inner[d]];
      } else {
        if (depth == 0) return -1;
        ++inner[path[--depth]];
      }
    }
    return depth;
  }

  HECATE_HD void move_along(i64 depth, i64 target) {
    const i64 from = path[0], to = path[depth];
    i64 moved = smaller(load[from] - target, target - load[to]);
    for (i64 i = 0; i < depth; ++i) moved = smaller(moved, amount[a.device_pairs[pointer[path[i]]]]);
    for (i64 i = 0; i < depth; ++i) {
      const i64 d = path[i], p = a.device_pairs[pointer[d]];
      amount[p] -= moved;
      amount[a.first[a.expert[p]] + inner[d]] += moved;
    }
    load[from] -= moved;
    load[to] += moved;
  }

  // Newton's method on the cut: the tokens of the devices that were reached cannot leave them.
  HECATE_HD i64 min_max() {
    split_evenly();
    alone([&] {
      scalar[kSum] = 0;
      for (i64 d = 0; d < a.devices; ++d) scalar[kSum] += load[d];
    });
    i64 target = (read(kSum) + a.devices - 1) / a.devices;
    for (;;) {
      while (levels(target)) {
        all(a.devices, [&](i64 d) { pointer[d] = a.device_first[d], inner[d] = 0; });
        alone([&] {
          for (i64 d = 0; d < a.devices; ++d) {
            while (level[d] == 0 && load[d] > target) {
              const i64 depth = walk(d, target);
              if (depth < 0) break;
              move_along(depth, target);
            }
          }
        });
      }
      alone([&] {
        scalar[kSum] = scalar[kMost] = 0;
        for (i64 d = 0; d < a.devices; ++d)
          if (level[d] >= 0) scalar[kSum] += load[d], ++scalar[kMost];
      });
      const i64 sum = read(kSum), reached = read(kMost);
      if (reached == 0) return target;
      target = (sum + reached - 1) / reached;
    }
  }
};

}  // namespace hecate
