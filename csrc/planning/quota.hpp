// Exact min-max token quota over given holders: own device first, then own node (docs/design.md, decision 6).
#pragma once

#include <cstdint>
#include <vector>

#include "for_each_true.hpp"
#include "planning/network.hpp"

namespace hecate {

struct Shape {
  int devices, experts, devices_per_node;
  int nodes() const { return devices / devices_per_node; }
};

// Holder pairs in ascending (expert, device) order; those of expert e have the indices [first[e], first[e + 1]).
struct Holders {
  std::vector<int> expert, device, first;
};

Holders holders_of(const bool* placement, const Shape& shape);

// Experts by descending load; on a tie, by ascending number.
std::vector<int> hottest_first(const Tokens& loads);

// int64 [devices, experts] -> the sum over devices.
Tokens column_sums(const std::int64_t* counts, const Shape& shape);

// The smallest achievable maximum device load.
std::int64_t min_max_load(const Tokens& loads, const Holders& holders, const Shape& shape);

// Whether no device needs to compute more than `target` tokens.
bool balances(const Tokens& loads, const Holders& holders, const Shape& shape, std::int64_t target);

// The tokens per pair, from all sources together, with the smallest achievable maximum device load.
Tokens holder_loads(const Tokens& loads, const Holders& holders,
                                       const Shape& shape);

// A lower bound on the maximum load over locations (devices or nodes) if each computes at most the tokens of its own
// experts and of `slots` others.
std::int64_t lower_bound_load(const Tokens& loads, const std::int64_t* owners,
                              const Tokens& slots);

// Tokens per pair such that no device is above `limit` (which must be achievable). Subject to that, as many tokens as
// possible stay on their own device, then as many as possible in their own node. If these two goals conflict, tokens
// leave their own device until 98 % of the tokens that could stay in their node do.
Tokens local_amounts(const std::int64_t* counts, const Holders& holders, const Shape& shape,
                                        std::int64_t limit);

// Splits `amounts` by source device into quota [devices, pairs]: own device first, then own node, then other nodes.
void split_by_source(const std::int64_t* counts, const Holders& holders, const Tokens& amounts,
                     const Shape& shape, std::int64_t* quota);

// The paper's dispatch (section 4.4): tokens stay on their device if it holds the expert, else they are split evenly
// over the holders in their node, else evenly over all holders.
void even_quota(const std::int64_t* counts, const Holders& holders, const Shape& shape, std::int64_t* quota);

}  // namespace hecate
