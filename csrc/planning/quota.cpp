#include "planning/quota.hpp"

#include <algorithm>
#include <iterator>
#include <numeric>

#include "planning/min_cost.hpp"

namespace hecate {

namespace {

// Weights of the objective: the value of a token that stays on its own device, and the additional value of a token that
// stays in its own node (which includes its own device).
struct Worth {
  int own, node;
};
// Tried in this order: from valuing the own device most to valuing the own node most.
constexpr Worth kWorths[] = {{3, 1}, {7, 4}, {5, 4}, {3, 4}, {1, 3}};
constexpr std::int64_t kNodePercent = 98;

// An expert's holders in one node, as a range of pairs, and the number of tokens that this node's devices route to it.
struct Group {
  int expert, node, begin, end;
  std::int64_t tokens;
};

std::vector<Group> groups_of(const std::int64_t* counts, const Holders& holders, const Shape& shape) {
  std::vector<Group> groups;
  groups.reserve(holders.expert.size());
  for (int e = 0; e < shape.experts; ++e) {
    for (int p = holders.first[e]; p < holders.first[e + 1];) {
      Group group{e, holders.device[p] / shape.devices_per_node, p, p, 0};
      while (p < holders.first[e + 1] && holders.device[p] / shape.devices_per_node == group.node) ++p;
      group.end = p;
      const std::int64_t* row = counts + std::int64_t{group.node} * shape.devices_per_node * shape.experts + e;
      for (int s = 0; s < shape.devices_per_node; ++s) group.tokens += row[std::int64_t{s} * shape.experts];
      groups.push_back(group);
    }
  }
  return groups;
}

// Distributes `tokens` over the pairs [begin, end), least loaded device first: each is filled up to `limit`; if all are
// full, the least loaded one gets the rest.
void pour(std::int64_t tokens, int begin, int end, const Holders& holders, std::int64_t limit, Tokens& load,
          Tokens& amounts) {
  while (tokens > 0) {
    int best = begin;
    for (int p = begin + 1; p < end; ++p)
      if (load[holders.device[p]] < load[holders.device[best]]) best = p;
    const std::int64_t room = limit - load[holders.device[best]];
    const std::int64_t given = room > 0 ? std::min(room, tokens) : tokens;
    amounts[best] += given;
    load[holders.device[best]] += given;
    tokens -= given;
  }
}

// The amounts that keep the most tokens local, even if devices are then above `limit`.
Tokens preferred_amounts(const std::int64_t* counts, const Holders& holders, const std::vector<Group>& groups,
                         const Shape& shape, std::int64_t limit, Tokens& load) {
  Tokens amounts(holders.expert.size(), 0), foreign = column_sums(counts, shape);
  Tokens rest(groups.size());
  for (std::size_t g = 0; g < groups.size(); ++g) {
    rest[g] = groups[g].tokens;
    for (int p = groups[g].begin; p < groups[g].end; ++p) {
      amounts[p] = counts[std::int64_t{holders.device[p]} * shape.experts + holders.expert[p]];
      load[holders.device[p]] += amounts[p];
      rest[g] -= amounts[p];
    }
    foreign[groups[g].expert] -= groups[g].tokens;
  }
  for (std::size_t g = 0; g < groups.size(); ++g)
    pour(rest[g], groups[g].begin, groups[g].end, holders, limit, load, amounts);
  for (int e = 0; e < shape.experts; ++e)
    pour(foreign[e], holders.first[e], holders.first[e + 1], holders, limit, load, amounts);
  return amounts;
}

}  // namespace

Holders holders_of(const bool* placement, const Shape& shape) {
  Holders holders;
  holders.first.reserve(shape.experts + 1);
  for (int e = 0; e < shape.experts; ++e) {
    holders.first.push_back(static_cast<int>(holders.expert.size()));
    for_each_true(placement + std::int64_t{e} * shape.devices, shape.devices, [&](int d) {
      holders.expert.push_back(e);
      holders.device.push_back(d);
    });
  }
  holders.first.push_back(static_cast<int>(holders.expert.size()));
  return holders;
}

std::vector<int> hottest_first(const Tokens& loads) {
  std::vector<int> order(loads.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return loads[a] > loads[b]; });
  return order;
}

Tokens column_sums(const std::int64_t* counts, const Shape& shape) {
  Tokens sums(shape.experts, 0);
  for (int s = 0; s < shape.devices; ++s)
    for (int e = 0; e < shape.experts; ++e) sums[e] += counts[std::int64_t{s} * shape.experts + e];
  return sums;
}

namespace {

// Splits every expert's tokens evenly over its holders.
Network even_network(const Tokens& loads, const Holders& holders, const Shape& shape) {
  const int pairs = static_cast<int>(holders.expert.size());
  Network network(shape.experts, shape.devices, pairs);
  for (int p = 0; p < pairs; ++p) network.add_pair(holders.expert[p], holders.device[p]);
  for (int e = 0; e < shape.experts; ++e) {
    std::int64_t left = loads[e];
    for (int p = holders.first[e]; p < holders.first[e + 1]; ++p) {
      const std::int64_t share = left / (holders.first[e + 1] - p);
      network.add_amount(p, share);
      left -= share;
    }
  }
  return network;
}

// Gives every expert's tokens to its first holder. Balancing this takes less time than balancing an even split.
Network first_network(const Tokens& loads, const Holders& holders, const Shape& shape) {
  Network network(shape.experts, shape.devices, static_cast<int>(holders.expert.size()));
  for (std::size_t p = 0; p < holders.expert.size(); ++p) {
    const int e = holders.expert[p];
    network.add_pair(e, holders.device[p], network.holders(e) ? 0 : loads[e]);
  }
  return network;
}

}  // namespace

std::int64_t min_max_load(const Tokens& loads, const Holders& holders, const Shape& shape) {
  return first_network(loads, holders, shape).min_max();
}

bool balances(const Tokens& loads, const Holders& holders, const Shape& shape, std::int64_t target) {
  return first_network(loads, holders, shape).drain(target);
}

Tokens holder_loads(const Tokens& loads, const Holders& holders, const Shape& shape) {
  Network network = even_network(loads, holders, shape);
  network.min_max();
  return network.amount;
}

std::int64_t lower_bound_load(const Tokens& loads, const std::int64_t* owners, const Tokens& slots) {
  const std::vector<int> hottest = hottest_first(loads);
  Tokens most(slots.size(), 0);
  for (std::size_t e = 0; e < loads.size(); ++e) most[owners[e]] += loads[e];
  for (std::size_t d = 0; d < slots.size(); ++d) {
    std::int64_t left = slots[d];
    for (std::size_t i = 0; i < hottest.size() && left > 0; ++i)
      if (owners[hottest[i]] != static_cast<std::int64_t>(d)) most[d] += loads[hottest[i]], --left;
  }
  std::sort(most.begin(), most.end());
  std::int64_t left = std::accumulate(loads.begin(), loads.end(), std::int64_t{0});
  for (std::size_t d = 0; d < most.size(); ++d) {
    const std::int64_t share = ceil_div(left, static_cast<std::int64_t>(most.size() - d));
    if (share <= most[d]) return share;
    left -= most[d];
  }
  return most.back();
}

namespace {

// Vertices are devices, then groups (an expert's holders in one node), then experts. A device gains value for its own
// tokens and a group for its node's tokens; other tokens gain nothing. Tokens above the limit then move along the paths
// that lose the least value.
Tokens amounts_for(const std::int64_t* counts, const Holders& holders, const std::vector<Group>& groups,
                   const Shape& shape, std::int64_t limit, Worth worth) {
  Tokens load(shape.devices, 0);
  Tokens amounts = preferred_amounts(counts, holders, groups, shape, limit, load);
  const int count = static_cast<int>(groups.size()), pairs = static_cast<int>(amounts.size());
  MinCostFlow flow(shape.devices + count + shape.experts, count + pairs);
  std::vector<int> edge(pairs, -1);
  for (int g = 0; g < count; ++g) {
    const Group& group = groups[g];
    if (holders.first[group.expert + 1] - holders.first[group.expert] < 2) continue;
    const int vertex = shape.devices + g, expert = shape.devices + count + group.expert;
    std::int64_t sum = 0;
    for (int p = group.begin; p < group.end; ++p) {
      const int d = holders.device[p];
      const std::int64_t mine = counts[std::int64_t{d} * shape.experts + group.expert];
      edge[p] = flow.add_edge(vertex, d, amounts[p], mine, worth.own);
      sum += amounts[p];
    }
    flow.add_edge(expert, vertex, sum, group.tokens, worth.node);
  }
  Tokens excess(shape.devices + count + shape.experts, 0);
  for (int d = 0; d < shape.devices; ++d) excess[d] = load[d] - limit;
  flow.settle(excess);
  for (int p = 0; p < pairs; ++p)
    if (edge[p] >= 0) amounts[p] = flow.amount(edge[p]);
  return amounts;
}

// Number of tokens that stay in their own node.
std::int64_t node_tokens(const std::vector<Group>& groups, const Tokens& amounts) {
  std::int64_t sum = 0;
  for (const Group& group : groups)
    sum += std::min(group.tokens,
                    std::accumulate(amounts.begin() + group.begin, amounts.begin() + group.end, std::int64_t{0}));
  return sum;
}

}  // namespace

Tokens local_amounts(const std::int64_t* counts, const Holders& holders, const Shape& shape, std::int64_t limit) {
  const std::vector<Group> groups = groups_of(counts, holders, shape);
  const auto solve = [&](Worth worth) { return amounts_for(counts, holders, groups, shape, limit, worth); };
  const auto enough = [&](const Tokens& amounts, std::int64_t most) {
    return node_tokens(groups, amounts) * 100 >= most * kNodePercent;
  };
  Tokens amounts = solve(kWorths[0]);
  std::int64_t most = 0;
  for (const Group& group : groups) most += group.tokens;
  if (enough(amounts, most)) return amounts;
  most = node_tokens(groups, solve(*std::rbegin(kWorths)));
  for (const Worth* worth = std::begin(kWorths) + 1; !enough(amounts, most); ++worth) amounts = solve(*worth);
  return amounts;
}

void split_by_source(const std::int64_t* counts, const Holders& holders, const Tokens& amounts, const Shape& shape,
                     std::int64_t* quota) {
  const std::int64_t pairs = static_cast<std::int64_t>(amounts.size());
  std::fill(quota, quota + shape.devices * pairs, 0);
  std::vector<int> shared;
  for (int e = 0; e < shape.experts; ++e)
    if (holders.first[e + 1] - holders.first[e] > 1) shared.push_back(e);
  for (int s = 0; s < shape.devices; ++s)
    for (int e = 0; e < shape.experts; ++e)
      if (holders.first[e + 1] - holders.first[e] == 1)
        quota[s * pairs + holders.first[e]] = counts[std::int64_t{s} * shape.experts + e];
  Tokens tokens(shape.devices), left = amounts;
  for (int e : shared) {
    const int begin = holders.first[e], end = holders.first[e + 1];
    for (int s = 0; s < shape.devices; ++s) tokens[s] = counts[std::int64_t{s} * shape.experts + e];
    const auto give = [&](int s, int p) {
      const std::int64_t given = std::min(tokens[s], left[p]);
      quota[s * pairs + p] += given;
      tokens[s] -= given;
      left[p] -= given;
    };
    for (int p = begin; p < end; ++p) give(holders.device[p], p);
    for (int p = begin; p < end; ++p) {
      const int node = holders.device[p] / shape.devices_per_node * shape.devices_per_node;
      for (int s = node; s < node + shape.devices_per_node && left[p] > 0; ++s) give(s, p);
    }
    for (int p = begin, s = 0; p < end; ++p)
      for (; left[p] > 0; s += tokens[s] == 0) give(s, p);
  }
}

void even_quota(const std::int64_t* counts, const Holders& holders, const Shape& shape, std::int64_t* quota) {
  const std::int64_t pairs = static_cast<std::int64_t>(holders.expert.size());
  std::fill(quota, quota + shape.devices * pairs, 0);
  for (int s = 0; s < shape.devices; ++s) {
    const int node = s / shape.devices_per_node;
    for (int e = 0; e < shape.experts; ++e) {
      int own = -1, begin = holders.first[e + 1], end = holders.first[e];
      for (int p = holders.first[e]; p < holders.first[e + 1]; ++p) {
        if (holders.device[p] == s) own = p;
        if (holders.device[p] / shape.devices_per_node == node) begin = std::min(begin, p), end = p + 1;
      }
      if (begin >= end) begin = holders.first[e], end = holders.first[e + 1];
      if (own >= 0) begin = own, end = own + 1;
      // Each source starts its remainder at a different holder; otherwise the first holder would get all remainders.
      const std::int64_t tokens = counts[std::int64_t{s} * shape.experts + e], share = tokens / (end - begin);
      for (int i = 0; i < end - begin; ++i)
        quota[s * pairs + begin + (i + s) % (end - begin)] = share + (i < tokens % (end - begin));
    }
  }
}

}  // namespace hecate
