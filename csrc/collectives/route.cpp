// Chooses the shape that is done first and puts its hops into rounds.
#include "collectives/route.hpp"

#include <algorithm>
#include <limits>
#include <map>
#include <numeric>
#include <set>
#include <tuple>

namespace hecate {

namespace {

constexpr std::int64_t kLeastPiece = 64 * 1024;  // bytes
constexpr int kMostPieces = 64;

using Hops = std::vector<Hop> (*)(const Request&, const Shape&);

// What devices send and receive in each round.
class Loads {
 public:
  explicit Loads(int devices) : devices_(devices), most_(2 * static_cast<std::size_t>(devices)) {}

  void add(const Hop& hop, int round) {
    pairs_.emplace(hop.src, hop.dst, round);
    for (int port : {hop.src, devices_ + hop.dst}) most_[port] = std::max(most_[port], ++now_[{port, round}]);
  }

  bool has_room(const Hop& hop, int round) const {
    return !pairs_.count({hop.src, hop.dst, round}) && below_most(hop.src, round) && below_most(devices_ + hop.dst, round);
  }

  void move(const Hop& hop, int from, int to) {
    if (from == to) return;
    pairs_.erase({hop.src, hop.dst, from});
    for (int port : {hop.src, devices_ + hop.dst}) --now_[{port, from}];
    add(hop, to);
  }

 private:
  bool below_most(int port, int round) const {
    const auto it = now_.find({port, round});
    return it == now_.end() || it->second < most_[port];
  }

  const int devices_;
  std::set<std::tuple<int, int, int>> pairs_;  // sender, receiver, round
  std::map<std::pair<int, int>, int> now_;     // (port, round) -> pieces; a device's receiving port is numbered after all
  std::vector<int> most_;                      // per port, of any round
};

class Choice {
 public:
  Choice(const Request& request, Hops hops) : request_(request), hops_of_(hops) {
    consider(Shape{});
    direct_ns_ = timing_.total;
  }

  // Keep `shape` if it saves 5 % of the best so far: what the model does not know, more hops make worse.
  // Returns how long it takes.
  std::int64_t consider(const Shape& shape) {
    std::vector<Hop> hops = hops_of_(request_, shape);
    Timing timing = simulate(request_, hops);
    const std::int64_t total = timing.total;
    if (hops_.empty() || total < timing_.total - timing_.total / 20)
      shape_ = shape, hops_ = std::move(hops), timing_ = std::move(timing);
    return total;
  }

  // Every shape, its pieces doubled while that saves 1 %.
  void search(const std::vector<Shape>& shapes) {
    const std::int64_t most = std::min<std::int64_t>(kMostPieces, request_.chunk_bytes / kLeastPiece);
    for (Shape shape : shapes) {
      std::int64_t least = consider(shape), before;
      do {
        before = least;
        shape.pieces *= 2;
        if (shape.pieces <= most) least = std::min(least, consider(shape));
      } while (least < before - before / 100);
    }
  }

  Route route(bool staged) const;

 private:
  std::vector<int> rounds(const std::vector<int>& order, bool staged) const;
  void delay(const std::vector<int>& order, std::vector<int>& round) const;

  const Request& request_;
  const Hops hops_of_;
  Shape shape_;
  std::vector<Hop> hops_;
  Timing timing_;
  std::int64_t direct_ns_ = 0;
};

// A round is as long as the longest hop; a hop is in a later round than what it carries. Where receivers stage what
// they add (`staged`), a round has one piece of each peer.
std::vector<int> Choice::rounds(const std::vector<int>& order, bool staged) const {
  std::vector<int> round(hops_.size());
  std::set<std::tuple<int, int, int>> taken;
  const bool narrow = request_.partial_bytes == request_.chunk_bytes;  // results may be as received, not staged
  const bool waits = std::any_of(hops_.begin(), hops_.end(), [](const Hop& h) { return !h.after.empty(); });
  for (int i : order) {
    const Hop& hop = hops_[i];
    int at = waits ? static_cast<int>(timing_.start[i] / timing_.slot) : 0;
    for (int before : hop.after) at = std::max(at, round[before] + 1);
    if (hop.behind >= 0) at = std::max(at, round[hop.behind]);
    while (staged && !(hop.alone && narrow) && !taken.emplace(hop.src, hop.dst, at).second) ++at;
    round[i] = at;
  }
  return round;
}

// Moves each hop to the latest round that what waits for it allows, so that sums are under way, and in memory, for a
// shorter time. No device sends or receives more in a round than in its busiest one before, and one piece of each peer.
void Choice::delay(const std::vector<int>& order, std::vector<int>& round) const {
  constexpr int kNever = std::numeric_limits<int>::max();
  std::vector<int> latest(hops_.size(), kNever), by_round = order;
  std::stable_sort(by_round.begin(), by_round.end(), [&](int a, int b) { return round[a] < round[b]; });
  Loads loads(request_.devices);
  for (int i : order) loads.add(hops_[i], round[i]);
  for (auto it = by_round.rbegin(); it != by_round.rend(); ++it) {
    const Hop& hop = hops_[*it];
    if (latest[*it] != kNever) {
      int to = latest[*it];
      while (to > round[*it] && !loads.has_room(hop, to)) --to;
      loads.move(hop, round[*it], to);
      round[*it] = to;
    }
    for (int before : hop.after) latest[before] = std::min(latest[before], round[*it] - 1);
    if (hop.behind >= 0) latest[hop.behind] = std::min(latest[hop.behind], round[*it]);
  }
}

Route Choice::route(bool staged) const {
  std::vector<int> order(hops_.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return timing_.start[a] < timing_.start[b]; });
  std::vector<int> round = rounds(order, staged);
  if (staged) delay(order, round);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return round[a] < round[b]; });
  Route result;
  result.shape = shape_;
  for (int i : order) {
    result.hops.push_back(hops_[i]);
    result.round.push_back(round[i]);
  }
  result.predicted_ns = timing_.total;
  result.direct_ns = direct_ns_;
  result.bound_ns = bound_ns(request_);
  return result;
}

}  // namespace

Route gather_route(const Request& request) {
  Choice choice(request, gather_hops);
  const bool nodes = request.nodes() > 2, ports = request.nodes() > 1 && request.links.crossing < request.links.border;
  std::vector<Shape> shapes;
  for (int across : {kAll, 1, 2})
    for (int inside : {kAll, 1, 2, kBinomial}) {
      if (!nodes && across != kAll) continue;
      shapes.push_back({false, 1, inside, across, false});
      if (ports) shapes.push_back({false, 1, inside, across, true});
    }
  choice.search(shapes);
  return choice.route(false);
}

Route reduce_route(const Request& request) {
  Choice choice(request, reduce_hops);
  std::vector<Shape> shapes;
  for (int inside : {1, kAll})
    for (int across : {kAll, 1})
      if (across == kAll || request.nodes() > 2) shapes.push_back({false, 1, inside, across, false});
  choice.search(shapes);
  return choice.route(true);
}

}  // namespace hecate
