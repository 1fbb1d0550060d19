#include "planning/robust_copies.hpp"

#include <algorithm>
#include <numeric>

#include "planning/few_copies.hpp"

namespace hecate {

namespace {

constexpr std::int64_t kPermille = 1000;
// Targets in 1/1000 of the mean load. Loose ones come first, so that slots are not used up on perfecting some devices
// while others are still far above the mean.
constexpr std::int64_t kTargets[] = {1150, 1100, 1050, 1000};

// One guess of the loads, balanced over the current copies.
struct Guess {
  Network network;
  std::int64_t target;
  bool done;

  void drain() { done = done || network.drain(target); }
};

using Set = std::vector<Guess>;

Set make_set(const Guesses& guesses, int level, const std::vector<Pair>& held, int devices, std::int64_t permille) {
  Set set;
  set.reserve(guesses.count);
  for (int k = 0; k < guesses.count; ++k) {
    Guess guess{Network(guesses.experts, devices, static_cast<int>(held.size()) + devices), 0, false};
    for (const auto& [e, d] : held)
      guess.network.add_pair(e, d, guess.network.holders(e) ? 0 : guesses.of(level, k)[e]);
    guess.target = ceil_div(guess.network.total() * permille, devices * kPermille);
    guess.drain();
    set.push_back(std::move(guess));
  }
  return set;
}

// Per guess and expert: the tokens that a further copy on another device could take from the overloaded devices.
Tokens relief(const Set& set) {
  const int experts = set[0].network.experts();
  Tokens gain(set.size() * experts, 0);
  for (std::size_t k = 0; k < set.size(); ++k) {
    const Network& network = set[k].network;
    if (set[k].done) continue;
    std::int64_t excess = 0;
    for (std::int64_t load : network.load) excess += std::max<std::int64_t>(0, load - set[k].target);
    std::int64_t* row = &gain[k * experts];
    for (int p = 0; p < network.pairs(); ++p)
      if (network.reached(network.device_of[p])) row[network.expert_of[p]] += network.amount[p];
    for (int e = 0; e < experts; ++e) row[e] = std::min(row[e], excess);
  }
  return gain;
}

// Tokens that a copy of `expert` on `device` takes from the overloaded devices, summed over all guesses.
std::int64_t value_of(const Set& set, const Tokens& gain, int expert, int device) {
  const int experts = set[0].network.experts();
  std::int64_t value = 0;
  for (std::size_t k = 0; k < set.size(); ++k)
    if (!set[k].done && !set[k].network.reached(device))
      value += std::min(gain[k * experts + expert],
                        std::max<std::int64_t>(0, set[k].target - set[k].network.load[device]));
  return value;
}

// The copy that takes most tokens, among those for which `usable(expert, device)` is true; {-1, -1} if none takes any.
// Among devices that are nearly as good, the one with the least room below the target is chosen: devices with more
// room are kept for larger excesses.
template <typename Usable>
Pair best_copy(const Set& set, Usable usable) {
  const int experts = set[0].network.experts();
  const Tokens gain = relief(set);
  Tokens sum(experts, 0), value(set[0].network.devices()), room(set[0].network.devices(), 0);
  for (const Guess& guess : set)
    for (int d = 0; d < guess.network.devices(); ++d)
      room[d] += std::max<std::int64_t>(0, guess.target - guess.network.load[d]);
  for (std::size_t i = 0; i < gain.size(); ++i) sum[i % experts] += gain[i];
  for (;;) {
    const int e = static_cast<int>(std::max_element(sum.begin(), sum.end()) - sum.begin());
    if (sum[e] == 0) return {-1, -1};
    std::fill(value.begin(), value.end(), 0);
    for (int d = 0; d < set[0].network.devices(); ++d)
      if (usable(e, d)) value[d] = value_of(set, gain, e, d);
    const std::int64_t enough = *std::max_element(value.begin(), value.end()) * 9 / 10;
    int best = -1;
    for (int d = 0; d < set[0].network.devices(); ++d)
      if (value[d] > 0 && value[d] >= enough && (best < 0 || room[d] < room[best])) best = d;
    if (best >= 0) return {e, best};
    sum[e] = 0;
  }
}

// Adds the best copy repeatedly, until all guesses reach their targets or no copy helps.
void fill(Set& set, std::vector<Pair>& held, Limits& limits) {
  for (;;) {
    const Network& network = set[0].network;
    const Pair copy = best_copy(set, [&](int e, int d) {
      return limits.may_enter(network, e, d) && limits.can_send(network, e);
    });
    if (copy.first < 0) return;
    limits.take(network, copy.first, copy.second);
    for (Guess& guess : set) {
      guess.network.add_pair(copy.first, copy.second);
      guess.drain();
    }
    held.push_back(copy);
  }
}

// One guess during the local search: its balanced tokens and their largest device load.
struct Balanced {
  Network network;
  std::int64_t largest, mean;
};

// `old`, but with another expert in the slot of copy `pair`. The tokens of the replaced copy go back to its expert's
// owner: the owner of expert e is pair number e.
Network with_expert(const Network& old, int pair, int expert) {
  Network network(old.experts(), old.devices(), old.pairs());
  for (int p = 0; p < old.pairs(); ++p)
    if (p == pair) network.add_pair(expert, old.device_of[p]);
    else network.add_pair(old.expert_of[p], old.device_of[p], old.amount[p]);
  network.add_amount(old.expert_of[pair], old.amount[pair]);
  return network;
}

// Gives the slot of copy `pair` to another expert and balances all guesses again; keeps the change unless it increases
// the sum, over the guesses, of their largest loads.
void try_expert(std::vector<Balanced>& set, int pair, int expert) {
  std::int64_t slack = 0;  // by how much the remaining guesses could still lower the sum
  for (const Balanced& guess : set) slack += guess.largest - guess.mean;
  std::vector<Balanced> trial;
  trial.reserve(set.size());
  std::int64_t change = 0;
  for (const Balanced& guess : set) {
    Balanced now{with_expert(guess.network, pair, expert), 0, guess.mean};
    now.largest = now.network.min_max();
    slack -= guess.largest - guess.mean;
    change += now.largest - guess.largest;
    if (change > slack) return;
    trial.push_back(std::move(now));
  }
  set.swap(trial);
}

// Whether the limits allow the copies of `held` to be made in this order.
bool fits(const Guesses& guesses, const std::vector<Pair>& held, int devices, Limits limits) {
  Network network(guesses.experts, devices, static_cast<int>(held.size()));
  for (int p = 0; p < static_cast<int>(held.size()); ++p) {
    const auto [e, d] = held[p];
    if (p >= guesses.experts) {
      if (!limits.may_enter(network, e, d) || !limits.can_send(network, e)) return false;
      limits.take(network, e, d);
    }
    network.add_pair(e, d);
  }
  return true;
}

// splitmix64: a random number generator that makes the same proposals on every rank.
std::uint64_t next_random(std::uint64_t& state) {
  std::uint64_t z = state += 0x9E3779B97F4A7C15;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
  return z ^ (z >> 31);
}

// Local search: gives random slots to other experts, more often to hot ones, unless that raises the largest loads.
void refine(const Guesses& guesses, std::vector<Pair>& held, int devices, const Limits& limits, int swaps) {
  std::vector<std::int64_t> below(guesses.experts);
  std::partial_sum(guesses.of(0, 0), guesses.of(0, 0) + guesses.experts, below.begin());
  const std::size_t copies = held.size() - guesses.experts;
  if (copies == 0 || below.back() == 0) return;
  std::vector<Balanced> set;
  for (Guess& guess : make_set(guesses, 0, held, devices, kPermille)) {
    const std::int64_t largest = guess.network.min_max();
    set.push_back({std::move(guess.network), largest, guess.target});
  }
  const auto balanced = [](const Balanced& guess) { return guess.largest == guess.mean; };
  std::uint64_t state = 0;
  while (swaps-- > 0 && !std::all_of(set.begin(), set.end(), balanced)) {
    const std::size_t pair = guesses.experts + next_random(state) % copies;
    const auto pick = static_cast<std::int64_t>(next_random(state) % static_cast<std::uint64_t>(below.back()));
    const int before = held[pair].first;
    held[pair].first = static_cast<int>(std::upper_bound(below.begin(), below.end(), pick) - below.begin());
    if (fits(guesses, held, devices, limits)) try_expert(set, static_cast<int>(pair), held[pair].first);
    if (set[0].network.expert_of[pair] != held[pair].first) held[pair].first = before;
  }
}

Holders single_holders(const std::vector<int>& owners) {
  Holders holders;
  for (int e = 0; e < static_cast<int>(owners.size()); ++e) {
    holders.expert.push_back(e);
    holders.device.push_back(owners[e]);
    holders.first.push_back(e);
  }
  holders.first.push_back(static_cast<int>(owners.size()));
  return holders;
}

}  // namespace

std::vector<Pair> robust_copies(const Guesses& guesses, const std::vector<int>& owners, const Limits& limits, int swaps) {
  const int experts = guesses.experts, devices = static_cast<int>(limits.in.size());
  std::vector<Pair> held;
  for (int e = 0; e < experts; ++e) held.emplace_back(e, owners[e]);
  const std::int64_t* likeliest = guesses.of(0, 0);
  const Tokens loads(likeliest, likeliest + experts);
  std::int64_t total = 0;
  for (std::int64_t load : loads) total += load;
  Limits left = limits;
  const Shape flat{devices, experts, devices};
  Network start = make_set({likeliest, 1, 1, experts}, 0, held, devices, kPermille)[0].network;
  const std::int64_t mean = ceil_div(total, devices);
  const Holders owned = single_holders(owners);
  for (const Pair& copy : few_copies(loads, owned, flat, mean, limits, nullptr, Order::kFlat, Effort::kGreedy)) {
    left.take(start, copy.first, copy.second);
    start.add_pair(copy.first, copy.second);
    held.push_back(copy);
  }
  for (std::int64_t permille : kTargets)
    for (int level = 0; level < guesses.levels; ++level) {
      Set set = make_set(guesses, level, held, devices, permille);
      fill(set, held, left);
    }
  refine(guesses, held, devices, limits, swaps);
  return {held.begin() + experts, held.end()};
}

}  // namespace hecate
