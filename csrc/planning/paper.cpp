#include "planning/paper.hpp"

#include <algorithm>
#include <numeric>
#include <tuple>

namespace hecate {

namespace {

// A device with a free slot that does not hold the expert: in the node with the fewest holders of it; on a tie, most
// free slots.
int roomiest(const std::vector<char>& held, const std::vector<int>& free, const Shape& shape) {
  std::tuple<int, int, int, int> best{INT32_MAX, 0, 0, -1};
  for (int first = 0; first < shape.devices; first += shape.devices_per_node) {
    int copies = 0, room = 0;
    for (int d = first; d < first + shape.devices_per_node; ++d) copies += held[d], room += held[d] ? 0 : free[d];
    for (int d = first; d < first + shape.devices_per_node; ++d)
      if (free[d] > 0 && !held[d]) best = std::min(best, {copies, -room, -free[d], d});
  }
  return std::get<3>(best);
}

// The least loaded node with a free slot, and in it the least loaded device with one; on a tie, fewer free slots.
int least_loaded(const Tokens& load, const std::vector<int>& free, const Shape& shape) {
  std::tuple<std::int64_t, int, int> best{INT64_MAX, 0, -1};
  for (int first = 0; first < shape.devices; first += shape.devices_per_node) {
    const int end = first + shape.devices_per_node;
    const int room = std::accumulate(free.begin() + first, free.begin() + end, 0);
    const std::int64_t busy = std::accumulate(load.begin() + first, load.begin() + end, std::int64_t{0});
    if (room > 0) best = std::min(best, {busy, room, first});
  }
  const int first = std::get<2>(best);
  best = {INT64_MAX, 0, -1};
  for (int d = first; d < first + shape.devices_per_node; ++d)
    if (free[d] > 0) best = std::min(best, {load[d], free[d], d});
  return std::get<2>(best);
}

Tokens device_loads(const Tokens& loads, const Owners& owners, int devices) {
  Tokens sums(devices, 0);
  for (std::size_t e = 0; e < loads.size(); ++e) sums[owners[e]] += loads[e];
  return sums;
}

// The loads with those of the `degree` hottest experts left out: copies take that load off their owners.
Tokens cold_loads(Tokens loads, int degree) {
  const std::vector<int> order = hottest_first(loads);
  for (int i = 0; i < degree && i < static_cast<int>(order.size()); ++i) loads[order[i]] = 0;
  return loads;
}

// Swaps an expert of the most loaded device with a lighter one of another device while that lowers the larger of both
// devices' loads.
void swap_until(const Tokens& loads, Owners& owners, int devices, std::int64_t target) {
  for (Tokens busy = device_loads(loads, owners, devices);;) {
    const auto crowded = std::max_element(busy.begin(), busy.end()) - busy.begin();
    std::int64_t least = busy[crowded];
    if (least <= target) return;
    std::pair<int, int> best{-1, -1};
    for (int a = 0; a < static_cast<int>(loads.size()); ++a) {
      if (owners[a] != crowded) continue;
      for (int b = 0; b < static_cast<int>(loads.size()); ++b) {
        const std::int64_t moved = loads[a] - loads[b];
        const std::int64_t larger = std::max(busy[crowded] - moved, busy[owners[b]] + moved);
        if (owners[b] != crowded && larger < least) least = larger, best = {a, b};
      }
    }
    if (best.first < 0) return;
    std::swap(owners[best.first], owners[best.second]);
    busy = device_loads(loads, owners, devices);
  }
}

}  // namespace

std::vector<Pair> sparse_materialization(const Tokens& loads, const Owners& owners, const Shape& shape, int degree,
                                         int slots) {
  degree = std::min(degree, shape.experts);
  slots = std::min(slots, degree);
  std::vector<int> hottest = hottest_first(loads);
  hottest.resize(degree);
  std::int64_t total = 0;
  for (int e : hottest) total += loads[e];
  std::vector<int> free(shape.devices, slots);
  std::vector<Pair> copies;
  for (int e : hottest) {
    std::vector<char> held(shape.devices, 0);
    held[owners[e]] = 1;
    if (degree <= slots) {
      for (int d = 0; d < shape.devices; ++d)
        if (!held[d]) copies.emplace_back(e, d);
      continue;
    }
    std::int64_t share = total ? ceil_div(std::int64_t{shape.devices} * slots * loads[e], total) : 0;
    for (share = std::min<std::int64_t>(share, shape.devices - 1); share > 0; --share) {
      const int d = roomiest(held, free, shape);
      if (d < 0) break;
      held[d] = 1;
      --free[d];
      copies.emplace_back(e, d);
    }
  }
  return copies;
}

std::vector<Owners> heterogeneous_sharding(const std::vector<Tokens>& layers, const std::vector<int>& degrees,
                                           const Shape& shape) {
  std::int64_t experts = 0;
  std::vector<Owners> owners;
  std::vector<std::vector<int>> order;
  std::vector<std::pair<std::int64_t, int>> turn;
  for (int i = 0; i < static_cast<int>(layers.size()); ++i) {
    experts += static_cast<std::int64_t>(layers[i].size());
    owners.emplace_back(layers[i].size(), -1);
    order.push_back(hottest_first(layers[i]));
    turn.push_back({-*std::max_element(layers[i].begin(), layers[i].end()), i});
  }
  std::sort(turn.begin(), turn.end());
  std::vector<int> free(shape.devices, static_cast<int>(ceil_div(experts, shape.devices)));
  for (const auto& [load, i] : turn) {
    Tokens busy(shape.devices, 0);
    for (std::size_t r = degrees[i]; r < order[i].size(); ++r) {
      const int e = order[i][r], d = least_loaded(busy, free, shape);
      owners[i][e] = d;
      busy[d] += layers[i][e];
      --free[d];
    }
  }
  for (std::size_t i = 0; i < layers.size(); ++i)
    for (int r = 0; r < degrees[i] && r < static_cast<int>(order[i].size()); ++r) {
      const auto d = std::max_element(free.begin(), free.end()) - free.begin();
      owners[i][order[i][r]] = d;
      --free[d];
    }
  return owners;
}

std::vector<Owners> few_moves(const std::vector<Tokens>& layers, std::vector<Owners> owners,
                              const std::vector<Owners>& goals, const std::vector<int>& degrees, int devices) {
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const Tokens cold = cold_loads(layers[i], degrees[i]), goal = device_loads(cold, goals[i], devices);
    swap_until(cold, owners[i], devices, *std::max_element(goal.begin(), goal.end()));
  }
  return owners;
}

}  // namespace hecate
