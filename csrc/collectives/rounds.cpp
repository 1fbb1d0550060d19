// Puts the hops of a route into rounds. A hop is in a later round than what it carries; a round is as long as the longest
// hop. Where receivers stage what they add, a round has one piece of each peer, and devices stage two of each at most.
#include <algorithm>
#include <limits>
#include <map>
#include <numeric>
#include <set>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "collectives/route.hpp"

namespace hecate {

namespace {

// Contributions are as wide as sums: results may be received, and added up, where they belong.
bool same_width(const Request& request) { return request.partial_bytes == request.chunk_bytes; }
bool in_place(const Request& request, const Hop& hop) { return hop.alone && same_width(request); }

// As the simulation starts them, in the order `order`. `staged`: one piece of each peer in a round.
std::vector<int> as_simulated(const Request& request, const std::vector<Hop>& hops, const Timing& timing,
                              const std::vector<int>& order, bool staged) {
  std::vector<int> round(hops.size());
  std::set<std::tuple<int, int, int>> taken;
  const bool waits = std::any_of(hops.begin(), hops.end(), [](const Hop& h) { return !h.after.empty(); });
  for (int i : order) {
    const Hop& hop = hops[i];
    int at = waits ? static_cast<int>(timing.start[i] / timing.slot) : 0;
    for (int before : hop.after) at = std::max(at, round[before] + 1);
    if (hop.behind >= 0) at = std::max(at, round[hop.behind]);
    while (staged && !in_place(request, hop) && !taken.emplace(hop.src, hop.dst, at).second) ++at;
    round[i] = at;
  }
  return round;
}

// What hops bring to one device, added up.
struct Sum {
  int buffers;        // pieces of memory while it is open
  bool final;         // the owner's result
  int missing = 0;    // hops that bring something and have no round yet
  bool open = false;  // it is in memory in the round at hand
};

// What a device has to do with the round at hand and the one after it.
struct Device {
  int limit = 0;                            // pieces of memory: two a peer, or what one sum and one result take
  int most_sent = 0, most_received = 0;     // in any round of the simulation
  int sent = 0, received = 0;
  int staged = 0, staged_after = 0;         // pieces received; while a round is waited for, the next one is open
  int sums = 0, finals = 0;                 // memory of the open ones, and of those of them that are results
  int largest_sum = 0, largest_result = 0;  // memory of one that is handed on, of one result
  int closed = 0;                           // memory of sums that are not open in the round before this one
  int used_after = 0;                       // all memory of the round after this one
};

// From the last round to the first: each hop in the latest round that what waits for it allows, so that sums are under
// way, and in memory, for a short time. Devices send and receive in a round no more than in their busiest simulated one.
//
// A device opens a sum (backwards: by the hop that carries it away) only while memory for one more piece remains, and a
// result only while a sum fits in besides. So each hop that brings it finds room, at the latest after an empty round,
// once its sender may open the sum that it carries: sums go from lower devices and nodes to higher ones, the lowest are
// brought by hops that carry none, and only then come results. So every hop finds its round.
class Backwards {
 public:
  Backwards(const Request& request, const std::vector<Hop>& hops, const std::vector<int>& order,
            const std::vector<int>& simulated)
      : request_(request), hops_(hops), waits_(hops.size()), latest_(hops.size()), place_(hops.size()),
        brings_(hops.size()), carries_(hops.size(), kNone), round_(hops.size()), devices_(request.devices) {
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
  static constexpr int kDrained = 2;  // empty rounds after which nothing received takes memory any more

  void find_waits(const std::vector<int>& simulated);
  void find_sums();
  void find_limits(const std::vector<int>& simulated);
  std::size_t fill(int now);
  bool fits(int i) const;
  void put(int i, int now);
  void release(int before, int latest);
  void next_round();

  bool staged(int i) const { return !in_place(request_, hops_[i]); }

  // Pieces that the open sums of its receiver take more when hop `i` gets a round. The first hop of a sum, if it is as
  // wide, becomes the sum.
  int growth(int i) const {
    const Sum& sum = sums_[brings_[i]];
    if (sum.missing == 1) return sum.open && same_width(request_) ? -sum.buffers : 0;
    return sum.open ? 0 : sum.buffers;
  }

  const Request& request_;
  const std::vector<Hop>& hops_;
  std::vector<int> waits_, latest_;    // per hop: those that wait for it and have no round, and what the others allow
  std::vector<int> place_;             // per hop: the later the simulation starts it, the lower
  std::vector<int> brings_, carries_;  // per hop: the sum it adds to; the one that it carries away, or kNone
  std::vector<Sum> sums_;
  std::vector<int> round_;
  std::vector<Device> devices_;
  std::set<std::pair<int, int>> ready_;  // latest round (negative), hop: nothing without a round waits for it
  std::set<std::pair<int, int>> now_;    // place, hop: those of them that may have the round at hand
  std::set<std::pair<int, int>> pairs_;  // sender, receiver: of the round at hand
};

void Backwards::find_waits(const std::vector<int>& simulated) {
  for (const Hop& hop : hops_) {
    for (int before : hop.after) ++waits_[before];
    if (hop.behind >= 0) ++waits_[hop.behind];
  }
  for (std::size_t i = 0; i < hops_.size(); ++i)
    latest_[i] = waits_[i] == 0 ? simulated[i] : std::numeric_limits<int>::max();
}

void Backwards::find_sums() {
  std::map<std::tuple<int, int, int, bool>, int> known;  // expert, piece, device, final
  std::vector<std::map<int, int>> by_node;               // of each sum: node -> hops
  for (std::size_t i = 0; i < hops_.size(); ++i) {
    const Hop& hop = hops_[i];
    const auto [it, is_new] = known.emplace(std::make_tuple(hop.expert, hop.piece, hop.dst, hop.final), sums_.size());
    if (is_new) {
      sums_.push_back({hop.final && same_width(request_) ? 0 : 1, hop.final});
      by_node.emplace_back();
      // Its own contribution is added to a piece that is as wide.
      if (request_.held(hop.expert, hop.dst)) by_node.back()[request_.node_of(hop.dst)] = same_width(request_) ? 0 : 1;
    }
    brings_[i] = it->second;
    ++sums_[it->second].missing;
    ++by_node[it->second][request_.node_of(hop.first)];
  }
  // Several of one node are added up apart from the nodes before it.
  for (std::size_t s = 0; s < sums_.size(); ++s)
    sums_[s].buffers += std::any_of(std::next(by_node[s].begin()), by_node[s].end(), [](auto& n) { return n.second > 1; });
  for (std::size_t i = 0; i < hops_.size(); ++i) {
    const auto it = known.find({hops_[i].expert, hops_[i].piece, hops_[i].src, false});
    if (it != known.end()) carries_[i] = it->second;
  }
}

void Backwards::find_limits(const std::vector<int>& simulated) {
  std::set<std::pair<int, int>> peers;
  std::map<std::pair<int, int>, int> sent, received;
  for (std::size_t i = 0; i < hops_.size(); ++i) {
    const Hop& hop = hops_[i];
    Device &from = devices_[hop.src], &to = devices_[hop.dst];
    from.most_sent = std::max(from.most_sent, ++sent[{hop.src, simulated[i]}]);
    to.most_received = std::max(to.most_received, ++received[{hop.dst, simulated[i]}]);
    if (peers.emplace(hop.dst, hop.src).second) to.limit += 2;
    if (hop.partial && peers.emplace(hop.src, hop.dst).second) from.limit += 2;
    const Sum& sum = sums_[brings_[i]];
    if (sum.missing == 1 && sum.final) continue;
    int& largest = sum.final ? to.largest_result : to.largest_sum;
    largest = std::max(largest, sum.buffers);
  }
  for (Device& device : devices_)
    device.limit = std::max(device.limit, device.largest_sum + device.largest_result + 1);
}

// How many hops get round `now`.
std::size_t Backwards::fill(int now) {
  std::size_t filled = 0;
  const auto admit = [&] {
    for (; !ready_.empty() && -ready_.begin()->first >= now; ready_.erase(ready_.begin()))
      now_.emplace(place_[ready_.begin()->second], ready_.begin()->second);
  };
  admit();
  for (auto it = now_.begin(); it != now_.end();) {
    const int i = it->second;
    if (!fits(i)) {
      ++it;
      continue;
    }
    put(i, now);
    ++filled;
    admit();  // started before this one, so behind it here
    it = now_.erase(it);
  }
  return filled;
}

bool Backwards::fits(int i) const {
  const Hop& hop = hops_[i];
  const Device &from = devices_[hop.src], &to = devices_[hop.dst];
  if (from.sent == from.most_sent || to.received == to.most_received) return false;
  if (staged(i)) {
    const int more = growth(i), sums = to.sums + more;
    if (pairs_.count({hop.src, hop.dst}) || to.staged + 1 + to.staged_after + sums > to.limit) return false;
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
    pairs_.emplace(hop.src, hop.dst);
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
  for (int before : hop.after) release(before, now - 1);
  if (hop.behind >= 0) release(hop.behind, now);
}

// One hop less waits for `before`.
void Backwards::release(int before, int latest) {
  latest_[before] = std::min(latest_[before], latest);
  if (--waits_[before] == 0) ready_.emplace(-latest_[before], before);
}

void Backwards::next_round() {
  pairs_.clear();
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
