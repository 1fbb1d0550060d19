// The arguments of the quota kernel, and what it works in.
#pragma once

#include "hd.cuh"

namespace hecate {

// A pair is an expert and one of its holders, ascending. A group is an expert's holders in one node, consecutive pairs.
// The flow network has the devices, then the groups, then the experts as vertices. Arc a + 1 is the reverse of arc a.
struct QuotaArgs {
  const i64* counts;  // [devices, experts], tokens of each device for each expert
  i64* quota;         // [devices, pairs]
  i64* limit;         // [1], the maximum device load
  i64 devices, experts, pairs, groups, arcs, devices_per_node;
  // What depends on the placement alone, made on the host.
  const i64 *first, *device, *expert;         // [experts + 1] first pair; [pairs]; [pairs]
  const i64 *group_begin, *group_expert;      // [groups + 1] first pair; [groups]
  const i64 *device_first, *device_pairs;     // [devices + 1]; pairs on each device whose expert has several holders
  const i64 *pair_arc, *group_arc;            // first of 4 arcs of a pair and of a group; -1: the expert has one holder
  const i64 *arc_to, *arc_kind;               // [arcs]; kind 0 costs nothing, 1 is worth `own`, 2 is worth `node`
  const i64 *vertex_first, *vertex_arcs;      // [vertices + 1]; [arcs], the arcs that leave a vertex, in order
  i64* work;                                  // what QuotaMemory takes; null: it is in shared memory
};

enum Scalar { kAgain, kSum, kMost, kNearest, kScalars };

// Arrays in shared or global memory, and how the threads of the block share work on them.
template <typename Block>
struct QuotaMemory {
  const QuotaArgs& a;
  Block& block;
  i64 vertices;
  i64 *load, *amount, *level, *expert_seen;                    // of the min-max problem
  i64 *wanted, *wanted_load, *group_tokens, *rest, *foreign;   // before any token has to move
  i64 *room, *distance, *excess, *pointer, *inner;             // of the flow network
  i64 *path, *path_limit, *path_sent;                          // of a depth-first search
  i64* scalar;

  HECATE_HD QuotaMemory(const QuotaArgs& args, Block& on) : a(args), block(on) {
    vertices = a.devices + a.groups + a.experts;
    i64* next = a.work != nullptr ? a.work : reinterpret_cast<i64*>(block.shared());
    const auto take = [&](i64 size) {
      i64* taken = next;
      next += size;
      return taken;
    };
    load = take(a.devices), level = take(a.devices), wanted_load = take(a.devices);
    amount = take(a.pairs), wanted = take(a.pairs);
    expert_seen = take(a.experts), foreign = take(a.experts);
    group_tokens = take(a.groups), rest = take(a.groups);
    room = take(a.arcs);
    distance = take(vertices), excess = take(vertices), pointer = take(vertices), inner = take(vertices);
    path = take(vertices), path_limit = take(vertices), path_sent = take(vertices);
    scalar = take(kScalars);
  }

  // Calls `body(i)` for all i in [0, count) on all threads, and waits for them.
  template <typename Body>
  HECATE_HD void all(i64 count, Body body) {
    block.run([&](int x, int y) {
      for (i64 i = y * block.width() + x; i < count; i += block.threads()) body(i);
    });
    block.sync();
  }

  template <typename Body>
  HECATE_HD void alone(Body body) {
    all(1, [&](i64) { body(); });
  }

  // The value of a number that all threads read before one of them writes it again.
  HECATE_HD i64 read(Scalar which) {
    const i64 value = scalar[which];
    block.sync();
    return value;
  }

  HECATE_HD i64 mine(i64 pair) const { return a.counts[a.device[pair] * a.experts + a.expert[pair]]; }
  HECATE_HD i64 holders(i64 expert) const { return a.first[expert + 1] - a.first[expert]; }
};

}  // namespace hecate
