#include "planning/robust_copies.hpp"

#include <algorithm>
#include <numeric>

#include "planning/few_copies.hpp"
#include "planning/refine.hpp"

namespace hecate {

namespace {

// Targets in 1/1000 of the mean load. Loose ones come first, so that slots are not used up on perfecting some devices
// while others are still far above the mean.
constexpr std::int64_t kTargets[] = {1150, 1100, 1050, kBalanced};

// The local search spends less time on more pessimistic guesses: per level, the number of trials is
// divided by this, and the search ends if too few are left.
constexpr int kFewerTrials = 32, kLeastTrials = 4;

// Adds copies that take most load from overloaded devices.
class Filling {
 public:
  Filling(const Guesses& guesses, Holding& holding, int fixed, const Limits& limits, std::int64_t slots)
      : holding_(holding), fixed_(fixed), limits_(limits), slots_(slots), full_(holding.experts(), 0) {
    for (int level = 0; level < guesses.levels; ++level) ensembles_.emplace_back(guesses, level, holding);
  }

  void run() {
    for (std::int64_t permille : kTargets)
      for (Ensemble& ensemble : ensembles_) {
        if (free_slots() * 100 <= slots_) return;
        ensemble.balance(holding_, permille);
        fill(ensemble);
      }
  }

  // Local search on each level, with fewer trials the more pessimistic it is.
  void refine_all(const Limits& limits, int trials) {
    for (Ensemble& ensemble : ensembles_) {
      if (trials < kLeastTrials) return;
      const std::vector<int> before = holding_.expert_of;
      refine(ensemble, holding_, fixed_, limits, trials);
      trials /= kFewerTrials;
      for (Ensemble& other : ensembles_)
        if (&other != &ensemble) other.follow(holding_, before);
    }
  }

 private:
  std::int64_t free_slots() const { return std::accumulate(limits_.in.begin(), limits_.in.end(), std::int64_t{0}); }

  // Adds the best copy repeatedly, until all guesses reach their targets or no copy helps.
  void fill(Ensemble& ensemble) {
    for (;;) {
      const auto [expert, device] = best_copy(ensemble);
      if (expert < 0) return;
      limits_.take(holding_, expert, device);
      holding_.add_pair(expert, device);
      for (Ensemble& each : ensembles_) each.add_pair(device);
      ensemble.balance_newest(holding_);
    }
  }

  // The copy that takes most tokens, of the expert with most tokens to take; {-1, -1} if none takes any.
  Pair best_copy(const Ensemble& ensemble) {
    relief_ = ensemble.relief;
    for (;;) {
      const auto most = std::max_element(relief_.begin(), relief_.end());
      const int expert = static_cast<int>(most - relief_.begin());
      if (*most == 0) return {-1, -1};
      const int device = full_[expert] ? -1 : best_device(ensemble, expert);
      if (device >= 0) return {expert, device};
      *most = 0;
    }
  }

  // Among devices that are nearly as good, the one with the least room below the target: devices with more room are
  // kept for larger excesses.
  int best_device(const Ensemble& ensemble, int expert) {
    if (!limits_.can_send(holding_, expert)) return -1;
    usable_.clear();
    for (int d = 0; d < holding_.devices(); ++d)
      if (limits_.may_enter(holding_, expert, d)) usable_.push_back(d);
    full_[expert] = usable_.empty();
    ensemble.values_of(expert, usable_, values_);
    std::int64_t largest = 0;
    for (std::int64_t value : values_) largest = std::max(largest, value);
    int best = -1;
    for (std::size_t i = 0; i < usable_.size(); ++i)
      if (values_[i] > 0 && values_[i] >= largest * 9 / 10 &&
          (best < 0 || ensemble.room[usable_[i]] < ensemble.room[best]))
        best = usable_[i];
    return best;
  }

  Holding& holding_;
  const int fixed_;            // pairs that stay
  Limits limits_;              // what is left of them
  const std::int64_t slots_;  // devices times memory slots
  std::vector<Ensemble> ensembles_;
  Tokens relief_, values_;
  std::vector<int> usable_;
  std::vector<char> full_;  // per expert: whether no device can take a copy any more
};

// The pairs of `holding`, by ascending expert.
Holders holders_of(const Holding& holding) {
  Holders holders;
  for (int e = 0; e < holding.experts(); ++e) {
    holders.first.push_back(static_cast<int>(holders.expert.size()));
    for (int p = holding.first_of_expert(e); p >= 0; p = holding.next_of_expert(p)) {
      holders.expert.push_back(e);
      holders.device.push_back(holding.device_of[p]);
    }
  }
  holders.first.push_back(static_cast<int>(holders.expert.size()));
  return holders;
}

}  // namespace

std::vector<Pair> robust_copies(const Guesses& guesses, const std::vector<int>& owners, const std::vector<Pair>& given,
                                const Limits& limits, int trials) {
  const int experts = guesses.experts, devices = static_cast<int>(limits.in.size());
  Holding holding(experts, devices, experts + 2 * devices);
  for (int e = 0; e < experts; ++e) holding.add_pair(e, owners[e]);
  for (const auto& [expert, device] : given) holding.add_pair(expert, device);
  const int fixed = holding.pairs();
  const Tokens loads(guesses.of(0, 0), guesses.of(0, 0) + experts);
  const std::int64_t mean = ceil_div(std::accumulate(loads.begin(), loads.end(), std::int64_t{0}), devices);
  Limits left = limits;
  for (const auto& [expert, device] : few_copies(loads, holders_of(holding), {devices, experts, devices}, mean, limits,
                                                 nullptr, Order::kFlat, Effort::kGreedy)) {
    left.take(holding, expert, device);
    holding.add_pair(expert, device);
  }
  Filling filling(guesses, holding, fixed, left, std::accumulate(limits.in.begin(), limits.in.end(), std::int64_t{0}));
  filling.run();
  filling.refine_all(limits, trials);
  std::vector<Pair> copies;
  for (int p = fixed; p < holding.pairs(); ++p) copies.emplace_back(holding.expert_of[p], holding.device_of[p]);
  return copies;
}

}  // namespace hecate
