#include "collectives/simulate.hpp"

#include <algorithm>
#include <functional>

namespace hecate {

Simulator::Simulator(const Request& request)
    : request_(request), free_(4 * static_cast<std::size_t>(request.devices) + 3 * request.nodes()),
      parked_(free_.size()) {}

Simulator::Cost Simulator::cost(std::int64_t bytes, bool crosses) const {
  const Links& links = request_.links;
  if (crosses)
    return {links.message_ns + wire_ns(bytes, links.crossing), wire_ns(bytes, links.border),
            links.message_ns + wire_ns(bytes, std::min(links.crossing, links.border))};
  // The fixed costs of messages also occupy the fabric, as their bytes do: ranks that share cores send in turn.
  const std::int64_t fixed = links.message_ns / std::max<std::int64_t>(1, links.fabric / links.device);
  return {links.message_ns + wire_ns(bytes, links.device), fixed + wire_ns(bytes, links.fabric),
          links.message_ns + wire_ns(bytes, std::min(links.device, links.fabric))};
}

const std::vector<Simulator::Cost>& Simulator::costs_of(int pieces) {
  std::vector<Cost>& costs = costs_[pieces];
  if (costs.empty())
    for (std::int64_t piece = 0; piece < pieces; ++piece)
      for (std::int64_t all : {request_.chunk_bytes, request_.partial_bytes}) {
        const std::int64_t bytes = all * (piece + 1) / pieces - all * piece / pieces;
        costs.push_back(cost(bytes, false));
        costs.push_back(cost(bytes, true));
      }
  return costs;
}

void Simulator::prepare(const std::vector<Hop>& hops) {
  const int d = request_.devices, n = request_.nodes();
  demands_.resize(hops.size());
  int pieces = 0;
  const Cost* costs = nullptr;
  for (std::size_t i = 0; i < hops.size(); ++i) {
    const Hop& hop = hops[i];
    if (hop.pieces != pieces) pieces = hop.pieces, costs = costs_of(pieces).data();
    const int from = request_.node_of(hop.src), to = request_.node_of(hop.dst);
    const bool crosses = from != to;
    demands_[i].cost = costs + 4 * hop.piece + 2 * hop.partial + crosses;
    if (crosses) demands_[i].resource = {2 * d + hop.src, 3 * d + hop.dst, 4 * d + from, 4 * d + n + to};
    else demands_[i].resource = {hop.src, d + hop.dst, 4 * d + 2 * n + from, 4 * d + 2 * n + from};
  }
}

Bound Simulator::bound(const std::vector<Hop>& hops) {
  prepare(hops);
  std::fill(free_.begin(), free_.end(), 0);
  ready_.resize(hops.size());
  std::int64_t chain = 0;
  for (std::size_t i = 0; i < hops.size(); ++i) {
    const auto& [resource, cost] = demands_[i];
    std::int64_t start = 0;
    if (hops[i].after >= 0) start = ready_[hops[i].after] + request_.links.relay_ns;
    if (hops[i].behind >= 0) start = std::max(start, ready_[hops[i].behind]);
    ready_[i] = start + cost->duration;
    chain = std::max(chain, ready_[i]);
    free_[resource[0]] += cost->port;
    free_[resource[1]] += cost->port;
    free_[resource[2]] += cost->shared;
    if (resource[3] != resource[2]) free_[resource[3]] += cost->shared;
  }
  return {*std::max_element(free_.begin(), free_.end()), chain};
}

bool Simulator::run(const std::vector<Hop>& hops, std::int64_t limit, Timing& timing) {
  prepare(hops);
  std::fill(free_.begin(), free_.end(), 0);
  waits_.assign(hops.size(), 0);
  ready_.assign(hops.size(), 0);
  first_next_.assign(hops.size(), -1);
  next_.resize(2 * hops.size());
  for (auto& queue : parked_) queue.clear();
  events_.clear();
  timing.start.resize(hops.size());
  timing.slot = 1, timing.total = 0;
  started_ = 0;
  for (int i = 0; i < static_cast<int>(hops.size()); ++i) {
    if (hops[i].after >= 0) wait_for(hops[i].after, i, 0);
    if (hops[i].behind >= 0) wait_for(hops[i].behind, i, 1);
    if (waits_[i] == 0) events_.push_back({0, kHop | rank_of(hops[i], i)});
  }
  std::make_heap(events_.begin(), events_.end(), std::greater<>());
  while (!events_.empty() && timing.total < limit) {
    std::pop_heap(events_.begin(), events_.end(), std::greater<>());
    const Event event = events_.back();
    events_.pop_back();
    const int i = static_cast<int>(event.rank & 0xFFFFFFFF);
    if (event.rank & kHop) start_or_park(hops, i, event.time, timing);
    else wake(hops, i, event.time, timing);
  }
  if (timing.total < limit) return true;
  timing.total = static_cast<std::int64_t>(static_cast<__int128>(timing.total) * hops.size() / started_);
  return false;
}

void Simulator::wait_for(int before, int hop, int slot) {
  next_[2 * hop + slot] = first_next_[before];
  first_next_[before] = 2 * hop + slot;
  ++waits_[hop];
}

void Simulator::push(Event event) {
  events_.push_back(event);
  std::push_heap(events_.begin(), events_.end(), std::greater<>());
}

// A hop waits for that of its resources which becomes free last.
void Simulator::start_or_park(const std::vector<Hop>& hops, int i, std::int64_t now, Timing& timing) {
  const auto& [resources, cost] = demands_[i];
  int last = resources[0];
  for (int r : resources)
    if (free_[r] > free_[last]) last = r;
  if (free_[last] > now) {
    std::vector<std::uint64_t>& queue = parked_[last];
    if (queue.empty()) push({free_[last], static_cast<std::uint64_t>(last)});
    queue.push_back(rank_of(hops[i], i));
    std::push_heap(queue.begin(), queue.end(), std::greater<>());
    return;
  }
  for (int k = 0; k < 4; ++k) free_[resources[k]] = now + demands_[i].busy(k);
  timing.start[i] = now;
  ++started_;
  timing.slot = std::max(timing.slot, cost->duration);
  timing.total = std::max(timing.total, now + cost->duration);
  finish(hops, i, now + cost->duration);
}

void Simulator::finish(const std::vector<Hop>& hops, int i, std::int64_t end) {
  for (int next = first_next_[i]; next >= 0; next = next_[next]) {
    const int j = next / 2;
    ready_[j] = std::max(ready_[j], next % 2 ? end : end + request_.links.relay_ns);
    if (--waits_[j] == 0) push({ready_[j], kHop | rank_of(hops[j], j)});
  }
}

// `resource` may be free: start the hops that wait for it until it is taken. A hop that also needs another resource
// that is busy waits for that one.
void Simulator::wake(const std::vector<Hop>& hops, int resource, std::int64_t now, Timing& timing) {
  std::vector<std::uint64_t>& queue = parked_[resource];
  while (!queue.empty() && free_[resource] <= now) {
    const int i = static_cast<int>(queue.front() & 0xFFFFFFFF);
    std::pop_heap(queue.begin(), queue.end(), std::greater<>());
    queue.pop_back();
    start_or_park(hops, i, now, timing);
  }
  if (!queue.empty()) push({free_[resource], static_cast<std::uint64_t>(resource)});
}

}  // namespace hecate
