// List scheduling: the hop that can start earliest is always started next. A resource carries one message at a time.
#include <algorithm>
#include <array>
#include <functional>
#include <queue>
#include <tuple>
#include <utility>

#include "collectives/route.hpp"

namespace hecate {

namespace {

// The resources that a hop occupies, and for how long.
struct Use {
  int resource;
  std::int64_t busy_ns;
};

struct Demand {
  std::array<Use, 4> uses;
  std::int64_t duration;
};

class Network {
 public:
  explicit Network(const Request& request)
      : request_(request), free_(4 * static_cast<std::size_t>(request.devices) + 3 * request.nodes()) {}

  Demand demand(const Hop& hop) const {
    const Links& links = request_.links;
    const int d = request_.devices, n = request_.nodes();
    const int from = request_.node_of(hop.src), to = request_.node_of(hop.dst);
    const std::int64_t all = hop.partial ? request_.partial_bytes : request_.chunk_bytes;
    const std::int64_t bytes = all * (hop.piece + 1) / hop.pieces - all * hop.piece / hop.pieces;
    if (from != to) {
      const std::int64_t port = links.message_ns + wire_ns(bytes, links.crossing), border = wire_ns(bytes, links.border);
      return {{{{2 * d + hop.src, port}, {3 * d + hop.dst, port}, {4 * d + from, border}, {4 * d + n + to, border}}},
              links.message_ns + wire_ns(bytes, std::min(links.crossing, links.border))};
    }
    const std::int64_t port = links.message_ns + wire_ns(bytes, links.device);
    // The fixed costs of messages also occupy the fabric, as their bytes do: ranks that share cores send in turn.
    const std::int64_t fixed = links.message_ns / std::max<std::int64_t>(1, links.fabric / links.device);
    const Use fabric{4 * d + 2 * n + from, fixed + wire_ns(bytes, links.fabric)};
    return {{{{hop.src, port}, {d + hop.dst, port}, fabric, fabric}},
            links.message_ns + wire_ns(bytes, std::min(links.device, links.fabric))};
  }

  // Of the resources that `demand` needs, the one that becomes free last.
  int blocking(const Demand& demand) const {
    const auto later = [this](const Use& a, const Use& b) { return free_[a.resource] < free_[b.resource]; };
    return std::max_element(demand.uses.begin(), demand.uses.end(), later)->resource;
  }

  std::int64_t free_at(int resource) const { return free_[resource]; }
  std::size_t resources() const { return free_.size(); }

  void carry(const Demand& demand, std::int64_t start) {
    for (const Use& use : demand.uses) free_[use.resource] = start + use.busy_ns;
  }

 private:
  const Request& request_;
  std::vector<std::int64_t> free_;  // per resource: the time from which it is free
};

class Simulation {
 public:
  Simulation(const Request& request, const std::vector<Hop>& hops)
      : hops_(hops), network_(request), parked_(network_.resources()), waits_(hops.size()), ready_(hops.size()),
        next_(hops.size()) {
    timing_.start.resize(hops.size());
    for (std::size_t i = 0; i < hops.size(); ++i) {
      demands_.push_back(network_.demand(hops[i]));
      for (int before : hops[i].after) wait_for(before, i, request.links.relay_ns);
      if (hops[i].behind >= 0) wait_for(hops[i].behind, i, 0);
    }
  }

  Timing run() {
    for (std::size_t i = 0; i < hops_.size(); ++i)
      if (waits_[i] == 0) events_.emplace(0, kHop, hops_[i].piece, i);
    while (!events_.empty()) {
      const auto [now, kind, piece, i] = events_.top();
      events_.pop();
      if (kind == kHop)
        start_or_park(i, now);
      else
        wake(i, now);
    }
    return std::move(timing_);
  }

 private:
  static constexpr int kFree = 0, kHop = 1;                  // at equal times, hops that already waited come first
  using Event = std::tuple<std::int64_t, int, int, int>;     // time, kind, piece (low ones first), hop or resource
  using Waiting = std::pair<int, int>;                       // piece, hop
  template <typename T>
  using Queue = std::priority_queue<T, std::vector<T>, std::greater<>>;

  void wait_for(int before, std::size_t hop, std::int64_t delay) {
    next_[before].emplace_back(static_cast<int>(hop), delay);
    ++waits_[hop];
  }

  void start_or_park(int i, std::int64_t now) {
    const int resource = network_.blocking(demands_[i]);
    if (network_.free_at(resource) > now) {
      if (parked_[resource].empty()) events_.emplace(network_.free_at(resource), kFree, 0, resource);
      parked_[resource].emplace(hops_[i].piece, i);
      return;
    }
    network_.carry(demands_[i], now);
    const std::int64_t end = now + demands_[i].duration;
    timing_.start[i] = now;
    timing_.slot = std::max(timing_.slot, demands_[i].duration);
    timing_.total = std::max(timing_.total, end);
    for (const auto& [j, delay] : next_[i]) {
      ready_[j] = std::max(ready_[j], end + delay);
      if (--waits_[j] == 0) events_.emplace(ready_[j], kHop, hops_[j].piece, j);
    }
  }

  // `resource` may be free: start the hops that wait for it until it is taken. A hop that also needs another resource
  // that is busy waits for that one.
  void wake(int resource, std::int64_t now) {
    Queue<Waiting>& queue = parked_[resource];
    while (!queue.empty() && network_.free_at(resource) <= now) {
      const int i = queue.top().second;
      queue.pop();
      start_or_park(i, now);
    }
    if (!queue.empty()) events_.emplace(network_.free_at(resource), kFree, 0, resource);
  }

  const std::vector<Hop>& hops_;
  Network network_;
  std::vector<Demand> demands_;
  std::vector<Queue<Waiting>> parked_;  // hops waiting per resource; each non-empty queue has one wake-up event
  std::vector<int> waits_;
  std::vector<std::int64_t> ready_;
  std::vector<std::vector<std::pair<int, std::int64_t>>> next_;  // per hop: (later hop, its delay after this one)
  Queue<Event> events_;
  Timing timing_;
};

}  // namespace

Timing simulate(const Request& request, const std::vector<Hop>& hops) { return Simulation(request, hops).run(); }

}  // namespace hecate
