#include "planning/few_copies.hpp"

#include <algorithm>
#include <optional>

#include "planning/backtrack.hpp"

namespace hecate {

namespace {

// Limit of the exhaustive search: the number of sets it examines times devices times experts, since the time per set
// grows with these. For 4 devices and 8 experts this allows 1024 sets; proving a target unreachable takes some hundred.
constexpr int kTrials = 1 << 15;

// Devices below the target that may still take a copy, by ascending room (target minus load).
class Rooms {
 public:
  Rooms(const Network& network, std::int64_t target, const Limits& limits) {
    for (int d = 0; d < network.devices(); ++d)
      if (network.load[d] < target && limits.in[d] > 0) sorted_.push_back({target - network.load[d], d});
    std::sort(sorted_.begin(), sorted_.end());
  }

  // Returns the device to move `tokens` of `expert` to, or -1: the one with the smallest room that takes all tokens;
  // else the larger one of the pair whose rooms together take them with the least left over; else the largest room.
  int best_fit(const Network& network, const Limits& limits, int expert, std::int64_t tokens) const {
    const auto usable = [&](int i) { return limits.may_enter(network, expert, sorted_[i].second); };
    const auto above = [&](int i) {
      while (i < count() && !usable(i)) ++i;
      return i;
    };
    const auto below = [&](int i) {
      while (i >= 0 && !usable(i)) --i;
      return i;
    };
    const auto at = std::lower_bound(sorted_.begin(), sorted_.end(), Room{tokens, -1});
    const int wide = static_cast<int>(at - sorted_.begin());
    if (const int fit = above(wide); fit < count()) return sorted_[fit].second;
    int high = below(wide - 1), best = high;
    if (high < 0) return -1;
    std::int64_t waste = -1;
    for (int low = above(0); low < high;) {
      const std::int64_t left = sorted_[low].first + sorted_[high].first - tokens;
      if (left >= 0 && (waste < 0 || left < waste)) waste = left, best = high;
      if (left >= 0) high = below(high - 1);
      else if (waste < 0 && sorted_[high].first * 2 < tokens) break;  // not even two of the largest
      else low = above(low + 1);
    }
    return sorted_[best].second;
  }

  void fill(int device, std::int64_t tokens, bool more_slots) {
    auto at = std::find_if(sorted_.begin(), sorted_.end(), [&](const Room& room) { return room.second == device; });
    const Room left{at->first - tokens, device};
    sorted_.erase(at);
    if (left.first > 0 && more_slots) sorted_.insert(std::lower_bound(sorted_.begin(), sorted_.end(), left), left);
  }

 private:
  using Room = std::pair<std::int64_t, int>;
  int count() const { return static_cast<int>(sorted_.size()); }
  std::vector<Room> sorted_;
};

// The pair with the most tokens among those on `device` whose expert can still be sent, or -1.
int largest_pair(const Network& network, int device, const Limits& limits) {
  int best = -1;
  for (int p = network.first_on_device(device); p >= 0; p = network.next_on_device(p))
    if (network.amount[p] > 0 && (best < 0 || network.amount[p] > network.amount[best]) &&
        limits.can_send(network, network.expert_of[p]))
      best = p;
  return best;
}

bool relieve(Network& network, int device, std::int64_t target, Rooms& rooms, Limits& limits) {
  while (network.load[device] > target) {
    const int pair = largest_pair(network, device, limits);
    if (pair < 0) return false;
    const int expert = network.expert_of[pair];
    const std::int64_t wanted = std::min(network.load[device] - target, network.amount[pair]);
    const int to = rooms.best_fit(network, limits, expert, wanted);
    if (to < 0) return false;
    const std::int64_t moved = std::min(wanted, target - network.load[to]);
    limits.take(network, expert, to);
    rooms.fill(to, moved, limits.in[to] > 0);
    network.add_pair(expert, to, moved);
    network.add_amount(pair, -moved);
  }
  return true;
}

// Devices with a small excess come first: for each a device with fitting room is found, and the remaining room serves
// the large excesses, which need several devices anyway.
bool relieve_all(Network& network, std::int64_t target, Limits& limits) {
  Rooms rooms(network, target, limits);
  std::vector<std::pair<std::int64_t, int>> crowded;
  for (int d = 0; d < network.devices(); ++d)
    if (network.load[d] > target) crowded.push_back({network.load[d], d});
  std::sort(crowded.begin(), crowded.end());
  for (const auto& [load, d] : crowded)
    if (!relieve(network, d, target, rooms, limits)) return false;
  return true;
}

// The pair with the most tokens among those on devices above the target whose expert can be copied to `device`, or -1.
int largest_excess(const Network& network, std::int64_t target, const Limits& limits, int device) {
  int best = -1;
  for (int p = 0; p < network.pairs(); ++p)
    if (network.load[network.device_of[p]] > target && (best < 0 || network.amount[p] > network.amount[best]) &&
        limits.may_enter(network, network.expert_of[p], device) && limits.can_send(network, network.expert_of[p]))
      best = p;
  return best;
}

// Repeatedly fills the device with the most room up to the target, even if the giving device then falls below the
// target and is filled by another one. This takes more copies than moving only each device's excess, but each slot
// moves as many tokens as its device can take, which matters if slots are scarce.
bool fill_all(Network& network, std::int64_t target, Limits& limits) {
  while (!network.drain(target)) {
    int to = -1;
    for (int d = 0; d < network.devices(); ++d)
      if (limits.in[d] > 0 && network.load[d] < target && (to < 0 || network.load[d] < network.load[to])) to = d;
    const int pair = to < 0 ? -1 : largest_excess(network, target, limits, to);
    if (pair < 0) return false;
    const int expert = network.expert_of[pair];
    const std::int64_t moved = std::min(network.amount[pair], target - network.load[to]);
    limits.take(network, expert, to);
    network.add_pair(expert, to, moved);
    network.add_amount(pair, -moved);
  }
  return true;
}

// Adds copies to `start` until no device is above the target: by moving each device's excess or, if that fails, by
// filling devices up to the target. Returns nothing if both fail.
std::optional<Network> cover(const Network& start, std::int64_t target, const Limits& limits, Effort effort) {
  Network network = start;
  Limits left = limits;
  if (network.drain(target) || relieve_all(network, target, left)) return network;
  if (effort == Effort::kGreedy) return std::nullopt;
  network = start;
  left = limits;
  if (fill_all(network, target, left)) return network;
  return std::nullopt;
}

Network network_of(const Tokens& loads, const Holders& held, const Shape& shape) {
  Network network(shape.experts, shape.devices, static_cast<int>(held.expert.size()) + 2 * shape.devices);
  for (std::size_t p = 0; p < held.expert.size(); ++p) {
    const int e = held.expert[p];
    network.add_pair(e, held.device[p], network.holders(e) ? 0 : loads[e]);
  }
  return network;
}

bool cover_flat(const Network& start, std::int64_t target, const Limits& limits, Effort effort, int& trials,
                std::vector<Pair>& copies) {
  const std::optional<Network> covered = cover(start, target, limits, effort);
  if (!covered) return effort == Effort::kAll && backtrack(start, target, limits, trials, copies);
  for (int p = start.pairs(); p < covered->pairs(); ++p)
    copies.emplace_back(covered->expert_of[p], covered->device_of[p]);
  return true;
}

// The holders, as (expert, node) pairs.
Holders node_holders(const Holders& held, const Shape& shape) {
  Holders nodes;
  for (int e = 0; e < shape.experts; ++e) {
    nodes.first.push_back(static_cast<int>(nodes.expert.size()));
    for (int p = held.first[e]; p < held.first[e + 1]; ++p) {
      const int node = held.device[p] / shape.devices_per_node;
      if (static_cast<int>(nodes.expert.size()) > nodes.first[e] && nodes.device.back() == node) continue;
      nodes.expert.push_back(e);
      nodes.device.push_back(node);
    }
  }
  nodes.first.push_back(static_cast<int>(nodes.expert.size()));
  return nodes;
}

// Balances the devices of one node. `given` lists the (expert, tokens) that the node computes; `outside` of these
// experts enter the node. Each of those starts on an imaginary device outside the node, which has no room for others.
bool cover_inside(const Holders& held, const Shape& shape, int node, int outside,
                  const std::vector<std::pair<int, std::int64_t>>& given, std::int64_t target, Limits& limits,
                  std::vector<Pair>& copies) {
  const int inside = shape.devices_per_node, first = node * inside;
  Network network(static_cast<int>(given.size()), inside + outside, 4 * static_cast<int>(given.size()));
  Limits local{{limits.in.begin() + first, limits.in.begin() + first + inside},
               {limits.out.begin() + first, limits.out.begin() + first + inside}};
  local.in.resize(inside + outside, 0);
  local.out.resize(inside + outside, 1);
  int next = inside;
  for (int i = 0; i < static_cast<int>(given.size()); ++i) {
    const auto [e, tokens] = given[i];
    for (int p = held.first[e]; p < held.first[e + 1]; ++p)
      if (held.device[p] / inside == node) network.add_pair(i, held.device[p] - first, network.holders(i) ? 0 : tokens);
    if (network.holders(i)) continue;
    network.load[next] = target;
    network.add_pair(i, next++, tokens);
  }
  const std::optional<Network> covered = cover(network, target, local, Effort::kAll);
  if (!covered) return false;
  for (int p = network.pairs(); p < covered->pairs(); ++p)
    copies.emplace_back(given[covered->expert_of[p]].first, first + covered->device_of[p]);
  return true;
}

// Uses up one send of a holder for each expert that enters a node.
bool charge_senders(const Network& nodes, int first_entry, const Holders& held, Limits& limits) {
  for (int p = first_entry; p < nodes.pairs(); ++p) {
    const int e = nodes.expert_of[p];
    int sender = held.device[held.first[e]];
    for (int q = held.first[e]; q < held.first[e + 1]; ++q)
      if (limits.out[held.device[q]] > limits.out[sender]) sender = held.device[q];
    if (--limits.out[sender] < 0) return false;
  }
  return true;
}

bool cover_nodes(const Tokens& loads, const Holders& held, const Shape& shape, std::int64_t node_target,
                 std::int64_t target, Limits limits, const Limits& node_limits, std::vector<Pair>& copies) {
  const Shape node_shape{shape.nodes(), shape.experts, 1};
  const Holders node_held = node_holders(held, shape);
  const Network start = network_of(loads, node_held, node_shape);
  const std::optional<Network> covered = cover(start, node_target, node_limits, Effort::kAll);
  if (!covered || !charge_senders(*covered, start.pairs(), held, limits)) return false;
  const Network& nodes = *covered;
  for (int n = 0; n < shape.nodes(); ++n) {
    int entered = 0;
    std::vector<std::pair<int, std::int64_t>> given;
    for (int p = nodes.first_on_device(n); p >= 0; p = nodes.next_on_device(p)) {
      entered += p >= start.pairs();
      given.emplace_back(nodes.expert_of[p], nodes.amount[p]);
    }
    std::reverse(given.begin(), given.end());
    if (!cover_inside(held, shape, n, entered, given, target, limits, copies)) return false;
  }
  return true;
}

}  // namespace

std::vector<Pair> few_copies(const Tokens& loads, const Holders& held, const Shape& shape, std::int64_t target,
                             const Limits& limits, const Limits* node_limits, Order order, Effort effort) {
  Network start = network_of(loads, held, shape);
  if (start.drain(target)) return {};
  const std::int64_t mean = ceil_div(start.total(), shape.devices);
  int trials = kTrials / (shape.devices * shape.experts);
  const auto attempt = [&](std::int64_t goal, std::vector<Pair>& copies) {
    if (order != Order::kFlat)
      for (std::int64_t quarters : {4, 2, 0}) {
        const std::int64_t node_target = shape.devices_per_node * (mean + (goal - mean) * quarters / 4);
        copies.clear();
        if (cover_nodes(loads, held, shape, node_target, goal, limits, *node_limits, copies)) return true;
      }
    if (order == Order::kNodesOnly) return false;
    copies.clear();
    return cover_flat(start, goal, limits, effort, trials, copies);
  };
  std::vector<Pair> best, copies;
  if (attempt(target, best)) return best;
  best.clear();
  Network least = start;
  std::int64_t low = target, high = least.min_max();
  while (high - low > std::max<std::int64_t>(1, low / 1000)) {
    const std::int64_t goal = low + (high - low) / 2;
    if (attempt(goal, copies)) high = goal, best.swap(copies);
    else low = goal;
  }
  return best;
}

}  // namespace hecate
