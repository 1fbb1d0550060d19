// Chooses the shape of a route that the simulation finds fastest.
#include "collectives/route.hpp"

#include <algorithm>
#include <limits>
#include <numeric>

#include "collectives/simulate.hpp"

namespace hecate {

namespace {

constexpr std::int64_t kLeastPiece = 64 * 1024;  // bytes
constexpr int kMostPieces = 64;

using Hops = void (*)(const Request&, const Groups&, const Travel&, std::vector<Hop>&);
using Rounds = std::vector<int> (*)(const Request&, const std::vector<Hop>&, const Timing&, const std::vector<int>&);

class Choice {
 public:
  Choice(const Request& request, Hops hops, bool with_owners)
      : request_(request), groups_(request, with_owners), hops_of_(hops), simulator_(request) {
    hops_of_(request_, groups_, shape_, hops_);
    simulator_.run(hops_, kForever, timing_);
    direct_ns_ = timing_.total;
  }

  // Try every shape, the most promising ones first, and double its number of pieces as long as that saves 5 %: what
  // saves less is not kept.
  void search(std::vector<Travel> shapes) {
    if (hops_.empty()) return;
    drop_equal(shapes);
    const std::int64_t most = std::min<std::int64_t>(kMostPieces, request_.chunk_bytes / kLeastPiece);
    for (Travel shape : sorted(shapes)) {
      std::int64_t least = consider(shape), before;
      do {
        before = least;
        shape.pieces *= 2;
        if (shape.pieces <= most) least = std::min(least, consider(shape));
      } while (least < before - before / 20);
    }
  }

  Route route(Rounds rounds) const;

 private:
  static constexpr std::int64_t kForever = std::numeric_limits<std::int64_t>::max();

  // Of shapes by which all pieces travel alike, keep the first: e.g. every tree over two holders is the same. Two pieces
  // show it, since pieces differ only in the holder that they begin with.
  void drop_equal(std::vector<Travel>& shapes) {
    std::vector<std::vector<Hop>> known;
    std::vector<Travel> kept;
    for (Travel shape : shapes) {
      Travel halves = shape;
      halves.pieces = 2;
      hops_of_(request_, groups_, halves, trial_hops_);
      if (std::find(known.begin(), known.end(), trial_hops_) != known.end()) continue;
      known.push_back(trial_hops_);
      kept.push_back(shape);
    }
    shapes.swap(kept);
  }

  // By ascending bound, since what is found first spares the simulation of what is slower. Pieces shorten chains.
  std::vector<Travel> sorted(const std::vector<Travel>& shapes) {
    std::vector<std::pair<std::int64_t, std::size_t>> order;
    for (std::size_t i = 0; i < shapes.size(); ++i) {
      hops_of_(request_, groups_, shapes[i], trial_hops_);
      const Bound bound = simulator_.bound(trial_hops_);
      order.emplace_back(std::max(bound.busiest, bound.chain / 4), i);
    }
    std::sort(order.begin(), order.end());
    std::vector<Travel> found;
    for (const auto& [bound, i] : order) found.push_back(shapes[i]);
    return found;
  }

  // Keep `shape` if it is 2 % faster than the best so far, or 5 % if it has more hops, since hops have costs that the
  // model does not know. Returns how long it takes; if it is not kept, this may be an estimate.
  std::int64_t consider(const Travel& shape) {
    hops_of_(request_, groups_, shape, trial_hops_);
    const std::int64_t limit = timing_.total - timing_.total / (trial_hops_.size() > hops_.size() ? 20 : 50);
    const Bound bound = simulator_.bound(trial_hops_);
    const std::int64_t least = std::max(bound.busiest, bound.chain);
    if (least >= limit) return least;
    if (!simulator_.run(trial_hops_, limit, trial_)) return std::max(least, trial_.total);
    shape_ = shape;
    hops_.swap(trial_hops_);
    std::swap(timing_, trial_);
    return timing_.total;
  }

  const Request& request_;
  const Groups groups_;
  const Hops hops_of_;
  Simulator simulator_;
  Travel shape_;
  std::vector<Hop> hops_, trial_hops_;
  Timing timing_, trial_;
  std::int64_t direct_ns_ = 0;
};

Route Choice::route(Rounds rounds) const {
  std::vector<int> order(hops_.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return timing_.start[a] < timing_.start[b]; });
  const std::vector<int> round = rounds(request_, hops_, timing_, order);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return round[a] < round[b]; });
  Route result;
  result.shape = shape_;
  result.hops.reserve(order.size());
  result.round.reserve(order.size());
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
  Choice choice(request, gather_hops, false);
  const bool nodes = request.nodes() > 2, ports = request.nodes() > 1 && request.links.crossing < request.links.border;
  std::vector<Travel> shapes;
  for (int across : {kAll, 1, 2})
    for (int inside : {kAll, 1, 2, kBinomial}) {
      if (!nodes && across != kAll) continue;
      shapes.push_back({false, 1, inside, across, false});
      if (ports) shapes.push_back({false, 1, inside, across, true});
    }
  choice.search(shapes);
  return choice.route(gather_rounds);
}

Route reduce_route(const Request& request) {
  Choice choice(request, reduce_hops, true);
  std::vector<Travel> shapes;
  for (int inside : {1, kAll})
    for (int across : {kAll, 1})
      if (across == kAll || request.nodes() > 2) shapes.push_back({false, 1, inside, across, false});
  choice.search(shapes);
  return choice.route(reduce_rounds);
}

}  // namespace hecate
