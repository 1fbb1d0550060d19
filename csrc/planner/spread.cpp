#include "planner/spread.hpp"

#include <algorithm>

namespace hecate {

namespace {

struct Guess {
  Network network;
  std::int64_t target;
  bool done;
};

std::vector<Guess> make_guesses(const std::int64_t* loads, int guesses, const std::vector<Pair>& held, int experts,
                                int devices) {
  std::vector<Guess> made;
  for (int k = 0; k < guesses; ++k) {
    Guess guess{Network(experts, devices, experts + 4 * devices), 0, false};
    for (const auto& [e, d] : held) {
      const bool first = guess.network.holders(e) == 0;
      guess.network.add_pair(e, d, first ? loads[std::int64_t{k} * experts + e] : 0);
    }
    guess.target = ceil_div(guess.network.total(), devices);
    guess.done = guess.network.drain(guess.target);
    made.push_back(std::move(guess));
  }
  return made;
}

// Per guess and expert, the tokens that a further copy outside of the crowded devices could relieve them of.
std::vector<std::int64_t> relief(const std::vector<Guess>& guesses, int experts) {
  std::vector<std::int64_t> gain(guesses.size() * experts, 0);
  for (std::size_t k = 0; k < guesses.size(); ++k) {
    const Network& network = guesses[k].network;
    if (guesses[k].done) continue;
    std::int64_t excess = 0;
    for (int d = 0; d < network.devices(); ++d) excess += std::max<std::int64_t>(0, network.load[d] - guesses[k].target);
    for (int p = 0; p < network.pairs(); ++p)
      if (network.reached(network.device_of[p])) gain[k * experts + network.expert_of[p]] += network.amount[p];
    for (int e = 0; e < experts; ++e) gain[k * experts + e] = std::min(gain[k * experts + e], excess);
  }
  return gain;
}

// The device where a copy of `expert` relieves most over all guesses, or -1 if nowhere.
int best_device(const std::vector<Guess>& guesses, const std::vector<std::int64_t>& gain, int expert,
                const Limits& limits) {
  const int experts = guesses[0].network.experts();
  int best = -1;
  std::int64_t most = 0;
  for (int d = 0; d < guesses[0].network.devices(); ++d) {
    if (!limits.may_enter(guesses[0].network, expert, d)) continue;
    std::int64_t value = 0;
    for (std::size_t k = 0; k < guesses.size(); ++k)
      if (!guesses[k].done && !guesses[k].network.reached(d))
        value += std::min(gain[k * experts + expert],
                          std::max<std::int64_t>(0, guesses[k].target - guesses[k].network.load[d]));
    if (value > most) best = d, most = value;
  }
  return best;
}

// The copy that relieves most; {-1, -1} if none does.
Pair best_copy(const std::vector<Guess>& guesses, const Limits& limits) {
  const int experts = guesses[0].network.experts();
  const std::vector<std::int64_t> gain = relief(guesses, experts);
  std::vector<std::int64_t> sum(experts, 0);
  for (std::size_t i = 0; i < gain.size(); ++i) sum[i % experts] += gain[i];
  for (;;) {
    const int e = static_cast<int>(std::max_element(sum.begin(), sum.end()) - sum.begin());
    if (sum[e] == 0) return {-1, -1};
    const int d = limits.sender(guesses[0].network, e) < 0 ? -1 : best_device(guesses, gain, e, limits);
    if (d >= 0) return {e, d};
    sum[e] = 0;
  }
}

}  // namespace

std::vector<Pair> spread(const std::int64_t* levels, int num_levels, int guesses, const std::vector<Pair>& held,
                         int experts, int devices, Limits limits) {
  std::vector<Pair> all = held, copies;
  for (int level = 0; level < num_levels; ++level) {
    std::vector<Guess> set =
        make_guesses(levels + std::int64_t{level} * guesses * experts, guesses, all, experts, devices);
    for (;;) {
      const Pair copy = best_copy(set, limits);
      if (copy.first < 0) break;
      limits.take(set[0].network, copy.first, copy.second);
      for (Guess& guess : set) {
        guess.network.add_pair(copy.first, copy.second);
        if (!guess.done) guess.done = guess.network.drain(guess.target);
      }
      all.push_back(copy);
      copies.push_back(copy);
    }
  }
  return copies;
}

}  // namespace hecate
