// Assigns the hops of a route to rounds. A hop is in a later round than the hops that bring what it carries; a round
// lasts as long as the longest hop. If receivers must stage pieces before adding them, a round has at most one piece
// from each peer, and a device stages at most two pieces per peer.
#include <algorithm>
#include <limits>
#include <map>
#include <numeric>
#include <set>
#include <stdexcept>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "collectives/route.hpp"

namespace hecate {

namespace {

// Whether contributions are as wide as sums, so that results can be received and added up directly in the output.
bool same_width(const Request& request) { return request.partial_bytes == request.chunk_bytes; }
bool in_place(const Request& request, const Hop& hop) { return hop.alone && same_width(request); }

// One number for two below kMostDevices and a third one.
std::uint64_t key_of(int first, int second, int third) {
  return (std::uint64_t(first) << 48) | (std::uint64_t(second) << 32) | static_cast<std::uint32_t>(third);
}

// Rounds that follow the simulated start times, in the order `order`. `staged`: at most one piece per peer and round.
std::vector<int> as_simulated(const Request& request, const std::vector<Hop>& hops, const Timing& timing,
                              const std::vector<int>& order, bool staged) {
  std::vector<int> round(hops.size());
  std::unordered_set<std::uint64_t> taken;
  if (staged) taken.reserve(hops.size());
  const bool waits = std::any_of(hops.begin(), hops.end(), [](const Hop& h) { return h.after >= 0; });
  for (int i : order) {
    const Hop& hop = hops[i];
    int at = waits ? static_cast<int>(timing.start[i] / timing.slot) : 0;
    if (hop.after >= 0) at = std::max(at, round[hop.after] + 1);
    if (hop.behind >= 0) at = std::max(at, round[hop.behind]);
    while (staged && !in_place(request, hop) && !taken.insert(key_of(hop.src, hop.dst, at)).second) ++at;
    round[i] = at;
  }
  return round;
}

// A sum: what hops bring to one device to be added up.
struct Sum {
  int buffers;        // memory that it needs while it is open, in pieces
  bool final;         // whether it is the owner's result
  int missing = 0;    // hops that bring contributions and have no round yet
  bool open = false;  // whether it is in memory in the current round
};

// Memory and messages of a device in the current round and the one after it.
struct Device {
  int limit = 0;                            // most memory, in pieces: two per peer, or what one sum and one result need
  int most_sent = 0, most_received = 0;     // largest numbers in any round of the simulation
  int sent = 0, received = 0;
  int staged = 0, staged_after = 0;         // pieces received in this round and the next: both are staged at once
  int sums = 0, finals = 0;                 // memory of all open sums, and of those that are results
  int largest_sum = 0, largest_result = 0;  // most memory of a sum that is sent on, and of a result
  int closed = 0;                           // memory of sums that are not open in the round before this one
  int used_after = 0;                       // total memory in the round after this one
};

// Works from the last round to the first: each hop gets the latest round that the hops which depend on it allow, so
// that sums are in memory for a short time only. In no round does a device send or receive more than in its busiest
// round of the simulation.
//
// A device opens a sum (working backwards: at the hop that carries it away) only if memory for one more piece remains,
// and a result only if one more sum still fits. Why every hop finds a round: sums travel from lower devices and nodes
// to higher ones, and the lowest sums are brought by hops that carry no sum. So, after an empty round at the latest,
// each hop that brings a contribution to an open sum has room, as soon as its sender may open the sum that the hop
// carries. Results come last.
class Backwards {
 public:
  Backwards(const Request& request, const std::vector<Hop>& hops, const std::vector<int>& order,
            const std::vector<int>& simulated)
      : request_(request), hops_(hops), waits_(hops.size()), latest_(hops.size()), place_(hops.size()),
        brings_(hops.size()), carries_(hops.size(), kNone), round_(hops.size()), devices_(request.devices),
        used_(static_cast<std::size_t>(request.devices) * request.devices, kNever) {
    for (std::size_t k = 0; k < order.size(); ++k) place_[order[k]] = -static_cast<int>(k);
    find_waits(simulated);
    find_sums();
    find_limits(simulated);
  }

  std::vector<int> run() {
    for (int i = 0; i < static_cast<int>(hops_.size()); ++i)
      if (waits_[i] == 0) ready_.emplace(-latest_[i], i);
    std::size_t left = hops_.size();
    int empty = 0;
    for (int now = hops_.empty() ? 0 : -ready_.begin()->first; left > 0; --now) {
      const std::size_t filled = fill(now);
      empty = filled > 0 || now_.empty() ? 0 : empty + 1;
      if (empty > kDrained) throw std::logic_error("rounds: no hop fits");
      left -= filled;
      next_round();
    }
    const int first = hops_.empty() ? 0 : *std::min_element(round_.begin(), round_.end());
    for (int& round : round_) round -= first;
    return std::move(round_);
  }

 private:
  static constexpr int kNone = -1;
  static constexpr int kNever = std::numeric_limits<int>::max();
  static constexpr int kDrained = 2;  // number of empty rounds after which no received piece is in memory any more

  void find_waits(const std::vector<int>& simulated);
  void find_sums();
  void find_limits(const std::vector<int>& simulated);
  std::size_t fill(int now);
  bool fits(int i, int now);
  void put(int i, int now);
  void release(int before, int latest);
  void next_round();

  int& used(const Hop& hop) { return used_[static_cast<std::size_t>(hop.src) * request_.devices + hop.dst]; }
  bool staged(int i) const { return !in_place(request_, hops_[i]); }

  // Additional memory, in pieces, that the receiver's open sums need once hop `i` has a round. If the first piece that
  // arrives is as wide as the sum, its memory becomes the sum's.
  int growth(int i) const {
    const Sum& sum = sums_[brings_[i]];
    if (sum.missing == 1) return sum.open && same_width(request_) ? -sum.buffers : 0;
    return sum.open ? 0 : sum.buffers;
  }

  const Request& request_;
  const std::vector<Hop>& hops_;
  std::vector<int> waits_, latest_;    // per hop: dependent hops without a round; latest round that the others allow
  std::vector<int> place_;             // per hop: its rank in the simulation, latest start first
  std::vector<int> brings_, carries_;  // per hop: the sum that it is added to; the sum that it carries, or kNone
  std::vector<Sum> sums_;
  std::vector<int> round_;
  std::vector<Device> devices_;
  std::set<std::pair<int, int>> ready_;  // (latest round, negative; hop): hops whose dependent hops all have rounds
  std::set<std::pair<int, int>> now_;    // (place, hop): those of them that may be in the current round
  std::vector<int> used_;                // [sender, receiver]: the last round that they were used in, or kNever
};

void Backwards::find_waits(const std::vector<int>& simulated) {
  for (const Hop& hop : hops_) {
    if (hop.after >= 0) ++waits_[hop.after];
    if (hop.behind >= 0) ++waits_[hop.behind];
  }
  for (std::size_t i = 0; i < hops_.size(); ++i)
    latest_[i] = waits_[i] == 0 ? simulated[i] : std::numeric_limits<int>::max();
}

void Backwards::find_sums() {
  std::unordered_map<std::uint64_t, int> known;  // of expert, device, piece and final
  known.reserve(hops_.size());
  const auto key = [](const Hop& hop, int device, bool final) {
    return key_of(hop.expert, device, 2 * hop.piece + final);
  };
  std::vector<std::map<int, int>> by_node;               // per sum: node -> number of hops
  for (std::size_t i = 0; i < hops_.size(); ++i) {
    const Hop& hop = hops_[i];
    const auto [it, is_new] = known.emplace(key(hop, hop.dst, hop.final), static_cast<int>(sums_.size()));
    if (is_new) {
      sums_.push_back({hop.final && same_width(request_) ? 0 : 1, hop.final});
      by_node.emplace_back();
      // The device's own contribution is added into a received piece if that is as wide as the sum.
      if (request_.held(hop.expert, hop.dst)) by_node.back()[request_.node_of(hop.dst)] = same_width(request_) ? 0 : 1;
    }
    brings_[i] = it->second;
    ++sums_[it->second].missing;
    ++by_node[it->second][request_.node_of(hop.first)];
  }
  // Several pieces of one node are summed separately before they are added to the sum of the nodes before it.
  for (std::size_t s = 0; s < sums_.size(); ++s)
    sums_[s].buffers += std::any_of(std::next(by_node[s].begin()), by_node[s].end(), [](auto& n) { return n.second > 1; });
  for (std::size_t i = 0; i < hops_.size(); ++i) {
    const auto it = known.find(key(hops_[i], hops_[i].src, false));
    if (it != known.end()) carries_[i] = it->second;
  }
}

void Backwards::find_limits(const std::vector<int>& simulated) {
  std::vector<char> peers(static_cast<std::size_t>(request_.devices) * request_.devices, 0);
  const auto is_new = [&](int device, int peer) {
    return !std::exchange(peers[static_cast<std::size_t>(device) * request_.devices + peer], 1);
  };
  std::unordered_map<std::uint64_t, int> sent, received;  // of device and round
  for (std::size_t i = 0; i < hops_.size(); ++i) {
    const Hop& hop = hops_[i];
    Device &from = devices_[hop.src], &to = devices_[hop.dst];
    from.most_sent = std::max(from.most_sent, ++sent[key_of(0, hop.src, simulated[i])]);
    to.most_received = std::max(to.most_received, ++received[key_of(0, hop.dst, simulated[i])]);
    if (is_new(hop.dst, hop.src)) to.limit += 2;
    if (hop.partial && is_new(hop.src, hop.dst)) from.limit += 2;
    const Sum& sum = sums_[brings_[i]];
    if (sum.missing == 1 && sum.final) continue;
    int& largest = sum.final ? to.largest_result : to.largest_sum;
    largest = std::max(largest, sum.buffers);
  }
  for (Device& device : devices_)
    device.limit = std::max(device.limit, device.largest_sum + device.largest_result + 1);
}

// Returns how many hops were put into round `now`.
std::size_t Backwards::fill(int now) {
  std::size_t filled = 0;
  const auto admit = [&] {
    for (; !ready_.empty() && -ready_.begin()->first >= now; ready_.erase(ready_.begin()))
      now_.emplace(place_[ready_.begin()->second], ready_.begin()->second);
  };
  admit();
  for (auto it = now_.begin(); it != now_.end();) {
    const int i = it->second;
    if (!fits(i, now)) {
      ++it;
      continue;
    }
    put(i, now);
    ++filled;
    admit();  // hops that the simulation starts before this one come after it here
    it = now_.erase(it);
  }
  return filled;
}

bool Backwards::fits(int i, int now) {
  const Hop& hop = hops_[i];
  const Device &from = devices_[hop.src], &to = devices_[hop.dst];
  if (from.sent == from.most_sent || to.received == to.most_received) return false;
  if (staged(i)) {
    const int more = growth(i), sums = to.sums + more;
    if (used(hop) == now || to.staged + 1 + to.staged_after + sums > to.limit) return false;
    if (more > 0 && to.finals + more + to.largest_sum >= to.limit) return false;
  }
  if (carries_[i] == kNone) return true;
  const int more = sums_[carries_[i]].buffers, sums = from.sums + more;
  return sums < from.limit && from.staged + from.staged_after + sums <= from.limit &&
         from.used_after + more <= from.limit;
}

void Backwards::put(int i, int now) {
  const Hop& hop = hops_[i];
  Device &from = devices_[hop.src], &to = devices_[hop.dst];
  round_[i] = now;
  ++from.sent, ++to.received;
  if (staged(i)) {
    used(hop) = now;
    ++to.staged;
  }
  to.sums += growth(i);
  Sum& brought = sums_[brings_[i]];
  const bool opens = !brought.open && brought.missing > 1, closes = brought.open && brought.missing == 1;
  if (brought.final) to.finals += opens ? brought.buffers : closes ? -brought.buffers : 0;
  if (closes && !same_width(request_)) to.closed += brought.buffers;
  brought.open = --brought.missing > 0;
  if (carries_[i] != kNone) {
    Sum& carried = sums_[carries_[i]];
    carried.open = true;
    from.sums += carried.buffers;
    from.used_after += carried.buffers;
  }
  if (hop.after >= 0) release(hop.after, now - 1);
  if (hop.behind >= 0) release(hop.behind, now);
}

// One hop fewer depends on `before`.
void Backwards::release(int before, int latest) {
  latest_[before] = std::min(latest_[before], latest);
  if (--waits_[before] == 0) ready_.emplace(-latest_[before], before);
}

void Backwards::next_round() {
  for (Device& device : devices_) {
    device.used_after = device.staged + device.staged_after + device.sums;
    device.staged_after = device.staged;
    device.sums -= device.closed;
    device.staged = device.sent = device.received = device.closed = 0;
  }
}

}  // namespace

std::vector<int> gather_rounds(const Request& request, const std::vector<Hop>& hops, const Timing& timing,
                               const std::vector<int>& order) {
  return as_simulated(request, hops, timing, order, false);
}

std::vector<int> reduce_rounds(const Request& request, const std::vector<Hop>& hops, const Timing& timing,
                               const std::vector<int>& order) {
  return Backwards(request, hops, order, as_simulated(request, hops, timing, order, true)).run();
}

}  // namespace hecate
