// List scheduling: the hop that can start earliest is always started next. A resource carries one message at a time.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <vector>

#include "collectives/route.hpp"

namespace hecate {

// Lower bounds on the time that hops take: how long the busiest resource is used, and the longest chain of hops.
struct Bound {
  std::int64_t busiest, chain;
};

// Simulates many routes of one request, in the same memory.
class Simulator {
 public:
  explicit Simulator(const Request& request);

  Bound bound(const std::vector<Hop>& hops);
  // Whether the hops take less than `limit`. If not, the simulation ends there, and `timing.total` is estimated from the
  // share of the hops that have started.
  bool run(const std::vector<Hop>& hops, std::int64_t limit, Timing& timing);

 private:
  // How long a message of one size occupies what it needs.
  struct Cost {
    std::int64_t port, shared, duration;  // shared: the node's fabric or border
  };
  struct Demand {
    std::array<int, 4> resource;
    const Cost* cost;
    std::int64_t busy(int i) const { return i < 2 ? cost->port : cost->shared; }
  };
  // Compared by time; then resources that become free, then hops by piece and number, so that hops that already waited
  // come first.
  struct Event {
    std::int64_t time;
    std::uint64_t rank;
    bool operator>(const Event& other) const { return key() > other.key(); }
    unsigned __int128 key() const { return static_cast<unsigned __int128>(time) << 64 | rank; }
  };
  static constexpr std::uint64_t kHop = std::uint64_t{1} << 63;

  const std::vector<Cost>& costs_of(int pieces);
  Cost cost(std::int64_t bytes, bool crosses) const;
  Demand demand(const Hop& hop);
  void prepare(const std::vector<Hop>& hops);
  void wait_for(int before, int hop, int slot);
  void start_or_park(const std::vector<Hop>& hops, int i, std::int64_t now, Timing& timing);
  void finish(const std::vector<Hop>& hops, int i, std::int64_t end);
  void wake(const std::vector<Hop>& hops, int resource, std::int64_t now, Timing& timing);
  void push(Event event);
  static std::uint64_t rank_of(const Hop& hop, int i) {
    return (static_cast<std::uint64_t>(hop.piece) << 32) | static_cast<std::uint32_t>(i);
  }

  const Request& request_;
  std::map<int, std::vector<Cost>> costs_;  // number of pieces -> [piece, partial, crosses]
  std::vector<std::int64_t> free_;          // per resource: the time from which it is free
  std::vector<Demand> demands_;             // per hop
  std::size_t started_ = 0;                 // number of hops
  std::vector<int> waits_;                  // per hop: how many others must end before it starts
  std::vector<std::int64_t> ready_;         // per hop: when these have ended
  std::vector<int> first_next_, next_;      // per hop: list of 2 * later hop + (0: it carries the piece on, 1: behind)
  std::vector<std::vector<std::uint64_t>> parked_;  // per resource: heap of waiting hops; has one wake-up event
  std::vector<Event> events_;                       // heap
};

}  // namespace hecate
