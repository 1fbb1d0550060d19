// Exact min-max token quota over given holders: own device first, then own node (docs/design.md, decision 6).
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "planning/network.hpp"

namespace hecate {

struct Shape {
  int devices, experts, devices_per_node;
  int nodes() const { return devices / devices_per_node; }
};

// Calls `visit(i)` for every true entry of a row, ascending; most are false, so whole words of those are skipped.
template <typename Visit>
void for_each_true(const bool* row, int size, Visit visit) {
  int i = 0;
  for (std::uint64_t word; i + 8 <= size; i += 8) {
    std::memcpy(&word, row + i, 8);
    for (int j = i; word != 0 && j < i + 8; ++j)
      if (row[j]) visit(j);
  }
  for (; i < size; ++i)
    if (row[i]) visit(i);
}

// Holder pairs in ascending (expert, device) order; `first[e]`..`first[e + 1]` are those of expert e.
struct Holders {
  std::vector<int> expert, device, first;
};

Holders holders_of(const bool* placement, const Shape& shape);

// Experts by descending load, equal ones ascending.
std::vector<int> hottest_first(const Tokens& loads);

// int64 [devices, experts] -> the sum over devices.
Tokens column_sums(const std::int64_t* counts, const Shape& shape);

// The smallest possible largest device load.
std::int64_t min_max_load(const Tokens& loads, const Holders& holders, const Shape& shape);

// The tokens of each pair under the smallest possible largest device load, whoever sends them.
Tokens holder_loads(const Tokens& loads, const Holders& holders,
                                       const Shape& shape);

// The least largest load over locations when each computes its own experts' tokens and those of `slots` others at most.
std::int64_t lower_bound_load(const Tokens& loads, const std::int64_t* owners,
                              const Tokens& slots);

// Tokens per pair: no device above `limit` (which must be reachable), and under that as many tokens as possible on
// their own device, and then as many as possible on their own node. Where the two are at odds, own devices give way
// until the tokens on their own node are 98 % of what is possible.
Tokens local_amounts(const std::int64_t* counts, const Holders& holders, const Shape& shape,
                                        std::int64_t limit);

// Splits `amounts` by source device into quota [devices, pairs]: own device, then own node, then the rest.
void split_by_source(const std::int64_t* counts, const Holders& holders, const Tokens& amounts,
                     const Shape& shape, std::int64_t* quota);

// The paper's dispatch (section 4.4): own device, else evenly over the own node's holders, else evenly over all.
void even_quota(const std::int64_t* counts, const Holders& holders, const Shape& shape, std::int64_t* quota);

}  // namespace hecate
