// The exact min-max quota for a given placement, on one block: how many tokens each device sends to each holder.
//
// The numbers are those of csrc/planning/quota.cpp: the smallest maximum device load, and subject to it as many tokens
// as possible on their own device, then in their own node. That optimum is not unique, so tokens are poured and paths
// are taken in the same order as there, by one thread; sums, breadth-first searches and shortest paths, which have one
// result, run on all threads.
#pragma once

#include "min_max.cuh"

namespace hecate {

constexpr i64 kFar = 0x7fffffffffffffffLL / 4;
constexpr i64 kUnlimited = 1LL << 60;
constexpr i64 kHop = 1LL << 20;  // an arc's length is cost * kHop + 1: of paths of one cost the one with fewest arcs
constexpr i64 kNodePercent = 98;
constexpr int kWorths = 5;

template <typename Block>
struct QuotaSolver : MinMax<Block> {
  using Base = MinMax<Block>;
  using Base::a, Base::all, Base::alone, Base::read, Base::holders, Base::mine, Base::scalar, Base::vertices;
  using Base::amount, Base::wanted, Base::wanted_load, Base::group_tokens, Base::rest, Base::foreign;
  using Base::room, Base::distance, Base::excess, Base::pointer, Base::path, Base::path_limit, Base::path_sent;

  HECATE_HD QuotaSolver(const QuotaArgs& args, Block& on) : Base(args, on) {}

  // --- The amounts that keep the most tokens local ------------------------------------------------------------------

  HECATE_HD void pour(i64 tokens, i64 begin, i64 end, i64 limit) {
    while (tokens > 0) {
      i64 best = begin;
      for (i64 p = begin + 1; p < end; ++p)
        if (wanted_load[a.device[p]] < wanted_load[a.device[best]]) best = p;
      const i64 space = limit - wanted_load[a.device[best]];
      const i64 given = space > 0 ? smaller(space, tokens) : tokens;
      wanted[best] += given;
      wanted_load[a.device[best]] += given;
      tokens -= given;
    }
  }

  HECATE_HD void prefer_local(i64 limit) {
    all(a.devices, [&](i64 d) { wanted_load[d] = 0; });
    all(a.experts, [&](i64 e) {
      foreign[e] = 0;
      for (i64 s = 0; s < a.devices; ++s) foreign[e] += a.counts[s * a.experts + e];
    });
    all(a.groups, [&](i64 g) {
      const i64 begin = a.group_begin[g], e = a.group_expert[g];
      const i64 source = a.device[begin] / a.devices_per_node * a.devices_per_node;
      group_tokens[g] = 0;
      for (i64 s = source; s < source + a.devices_per_node; ++s) group_tokens[g] += a.counts[s * a.experts + e];
      rest[g] = group_tokens[g];
      for (i64 p = begin; p < a.group_begin[g + 1]; ++p) {
        wanted[p] = mine(p);
        rest[g] -= wanted[p];
        atomic_add(&wanted_load[a.device[p]], wanted[p]);
      }
      atomic_add(&foreign[e], -group_tokens[g]);
    });
    alone([&] {
      for (i64 g = 0; g < a.groups; ++g) pour(rest[g], a.group_begin[g], a.group_begin[g + 1], limit);
      for (i64 e = 0; e < a.experts; ++e) pour(foreign[e], a.first[e], a.first[e + 1], limit);
    });
  }

  // --- Minimum-cost flow --------------------------------------------------------------------------------------------

  HECATE_HD void set_arc(i64 arc, i64 capacity, i64 flow) {
    room[arc] = capacity - flow;
    room[arc + 1] = flow;
  }

  HECATE_HD void fill_network(i64 limit) {
    all(a.pairs, [&](i64 p) {
      if (a.pair_arc[p] < 0) return;
      set_arc(a.pair_arc[p], mine(p), smaller(mine(p), wanted[p]));
      set_arc(a.pair_arc[p] + 2, kUnlimited, larger<i64>(0, wanted[p] - mine(p)));
    });
    all(a.groups, [&](i64 g) {
      if (a.group_arc[g] < 0) return;
      i64 sum = 0;
      for (i64 p = a.group_begin[g]; p < a.group_begin[g + 1]; ++p) sum += wanted[p];
      set_arc(a.group_arc[g], group_tokens[g], smaller(group_tokens[g], sum));
      set_arc(a.group_arc[g] + 2, kUnlimited, larger<i64>(0, sum - group_tokens[g]));
    });
    all(vertices, [&](i64 v) { excess[v] = v < a.devices ? wanted_load[v] - limit : 0; });
  }

  HECATE_HD i64 length(i64 arc, i64 own, i64 node) const {
    const i64 worth = a.arc_kind[arc] == 0 ? 0 : a.arc_kind[arc] == 1 ? own : node;
    return (arc % 2 == 0 ? -worth : worth) * kHop + 1;
  }

  static HECATE_HD i64 cost_of(i64 length) { return length >= 0 ? length / kHop : -((-length + kHop - 1) / kHop); }

  // Shortest paths from all vertices with excess; returns false if there is none. A limit that can be reached leads all
  // excess to some vertex without.
  HECATE_HD bool distances(i64 own, i64 node) {
    alone([&] { scalar[kAgain] = 0, scalar[kNearest] = kFar; });
    all(vertices, [&](i64 v) {
      distance[v] = excess[v] > 0 ? 0 : kFar;
      if (excess[v] > 0) scalar[kAgain] = 1;
    });
    if (read(kAgain) == 0) return false;
    for (;;) {
      alone([&] { scalar[kAgain] = 0; });
      all(a.arcs, [&](i64 arc) {
        const i64 from = distance[a.arc_to[arc ^ 1]];
        if (room[arc] == 0 || from >= kFar) return;
        const i64 reached = from + length(arc, own, node);
        if (reached >= distance[a.arc_to[arc]]) return;
        atomic_min(&distance[a.arc_to[arc]], reached);
        scalar[kAgain] = 1;
      });
      if (read(kAgain) == 0) break;
    }
    all(vertices, [&](i64 v) {
      if (excess[v] < 0) atomic_min(&scalar[kNearest], distance[v]);
    });
    return true;
  }

  HECATE_HD bool admissible(i64 arc, i64 vertex, i64 own, i64 node) const {
    return room[arc] != 0 && distance[a.arc_to[arc]] == distance[vertex] + length(arc, own, node);
  }

  // Depth-first search along shortest paths from `source`; returns how many of `limit` tokens left it.
  HECATE_HD i64 push(i64 source, i64 limit, i64 nearest, i64 own, i64 node) {
    i64 depth = 0, moved = -1;  // moved: what the search beyond the last vertex has sent, -1 before it
    path[0] = source, path_limit[0] = limit, path_sent[0] = 0;
    for (;;) {
      const i64 v = path[depth];
      bool done = false;
      if (moved >= 0) {
        const i64 arc = a.vertex_arcs[pointer[v]];
        room[arc] -= moved;
        room[arc ^ 1] += moved;
        path_sent[depth] += moved;
        done = path_sent[depth] == path_limit[depth];
        if (!done) ++pointer[v];
      } else if (excess[v] < 0 && cost_of(distance[v]) == nearest) {
        path_sent[depth] = smaller(path_limit[depth], -excess[v]);
        excess[v] += path_sent[depth];
        done = true;
      }
      while (!done && pointer[v] < a.vertex_first[v + 1] && !admissible(a.vertex_arcs[pointer[v]], v, own, node))
        ++pointer[v];
      if (done || pointer[v] == a.vertex_first[v + 1]) {
        moved = path_sent[depth];
        if (depth-- == 0) return moved;
      } else {
        const i64 arc = a.vertex_arcs[pointer[v]];
        path[depth + 1] = a.arc_to[arc];
        path_limit[depth + 1] = smaller(path_limit[depth] - path_sent[depth], room[arc]);
        path_sent[++depth] = 0;
        moved = -1;
      }
    }
  }

  // Moves the tokens above `limit` along the paths that lose the least value; sets `amount`.
  HECATE_HD void settle(i64 limit, i64 own, i64 node) {
    fill_network(limit);
    while (distances(own, node)) {
      all(vertices, [&](i64 v) { pointer[v] = a.vertex_first[v]; });
      alone([&] {
        const i64 nearest = cost_of(scalar[kNearest]);
        for (i64 v = 0; v < vertices; ++v)
          if (excess[v] > 0 && distance[v] == 0) excess[v] -= push(v, excess[v], nearest, own, node);
      });
    }
    all(a.pairs, [&](i64 p) {
      const i64 arc = a.pair_arc[p];
      amount[p] = arc < 0 ? wanted[p] : room[arc + 1] + room[arc + 3];
    });
  }

  // The number of tokens that stay in their own node.
  HECATE_HD i64 node_tokens() {
    alone([&] { scalar[kSum] = 0; });
    all(a.groups, [&](i64 g) {
      i64 sum = 0;
      for (i64 p = a.group_begin[g]; p < a.group_begin[g + 1]; ++p) sum += amount[p];
      atomic_add(&scalar[kSum], smaller(group_tokens[g], sum));
    });
    return read(kSum);
  }

  // Values the own device most, but the own node as much as it takes to keep 98 % of what it can keep at most. That is
  // found out with the last worth, unless the first keeps 98 % of all tokens.
  HECATE_HD void settle_by_worth(i64 limit) {
    constexpr i64 kOwn[kWorths] = {3, 7, 5, 3, 1}, kNode[kWorths] = {1, 4, 4, 4, 3};
    alone([&] {
      scalar[kMost] = 0;
      for (i64 g = 0; g < a.groups; ++g) scalar[kMost] += group_tokens[g];
    });
    i64 most = read(kMost);
    for (int turn = 0;; ++turn) {
      const int worth = turn == 0 ? 0 : turn == 1 ? kWorths - 1 : turn - 2;
      settle(limit, kOwn[worth], kNode[worth]);
      const i64 kept = node_tokens();
      if (turn == 1)
        most = kept;
      else if (kept * 100 >= most * kNodePercent)
        return;
    }
  }

  // --- Which device sends what --------------------------------------------------------------------------------------

  // Tokens of device s for this expert that have no holder yet.
  HECATE_HD i64 unsent(i64 s, i64 e) const {
    i64 left = a.counts[s * a.experts + e];
    for (i64 p = a.first[e]; p < a.first[e + 1]; ++p) left -= a.quota[s * a.pairs + p];
    return left;
  }

  HECATE_HD void give(i64 s, i64 p) {
    const i64 given = smaller(unsent(s, a.expert[p]), amount[p]);
    a.quota[s * a.pairs + p] += given;
    amount[p] -= given;
  }

  // Own device first, then own node, then the others.
  HECATE_HD void split_by_source() {
    all(a.devices * a.pairs, [&](i64 i) {
      const i64 p = i % a.pairs;
      a.quota[i] = holders(a.expert[p]) > 1 ? 0 : a.counts[i / a.pairs * a.experts + a.expert[p]];
    });
    all(a.experts, [&](i64 e) {
      const i64 begin = a.first[e], end = a.first[e + 1];
      if (end - begin < 2) return;
      for (i64 p = begin; p < end; ++p) give(a.device[p], p);
      for (i64 p = begin; p < end; ++p) {
        const i64 node = a.device[p] / a.devices_per_node * a.devices_per_node;
        for (i64 s = node; s < node + a.devices_per_node && amount[p] > 0; ++s) give(s, p);
      }
      for (i64 p = begin, s = 0; p < end; ++p)
        for (; amount[p] > 0 && s < a.devices; s += unsent(s, e) == 0) give(s, p);
    });
  }

  HECATE_HD void solve() {
    const i64 limit = this->min_max();
    alone([&] { *a.limit = limit; });
    prefer_local(limit);
    settle_by_worth(limit);
    split_by_source();
  }
};

struct Quota {
  using Args = QuotaArgs;

  template <typename Block>
  static HECATE_HD void run(const Args& a, Block& block) {
    QuotaSolver<Block> solver(a, block);
    solver.solve();
  }
};

#define HECATE_QUOTA(ENTRY) ENTRY(quota, hecate::Quota)

}  // namespace hecate
