#include "planning/backtrack.hpp"

#include <algorithm>
#include <numeric>
#include <tuple>

#include "planning/quota.hpp"

namespace hecate {

namespace {

// Connected components of devices that share experts: per device, the lowest device of its component.
std::vector<int> components(const Network& network) {
  std::vector<int> lowest(network.devices());
  std::iota(lowest.begin(), lowest.end(), 0);
  for (int e = 0; e < network.experts(); ++e)
    for (int p = network.first_of_expert(e); p >= 0; p = network.next_of_expert(p)) {
      const int a = lowest[network.device_of[network.first_of_expert(e)]], b = lowest[network.device_of[p]];
      if (a != b) std::replace(lowest.begin(), lowest.end(), std::max(a, b), std::min(a, b));
    }
  return lowest;
}

Tokens expert_tokens(const Network& network) {
  Tokens tokens(network.experts(), 0);
  for (int p = 0; p < network.pairs(); ++p) tokens[network.expert_of[p]] += network.amount[p];
  return tokens;
}

// Depth-first search through sets of copies that visits each set at most once.
class Search {
 public:
  Search(const Network& network, std::int64_t target, const Limits& limits, int& trials)
      : target_(target), trials_(trials), tokens_(expert_tokens(network)), hottest_(hottest_first(tokens_)),
        open_(tokens_.size() * network.devices()) {
    for (int e = 0; e < network.experts(); ++e)
      for (int d = 0; d < network.devices(); ++d) open(network, {e, d}) = limits.may_enter(network, e, d);
  }

  bool reach(Network network, const Limits& limits) {
    if (network.drain(target_)) return true;
    if (trials_ == 0) return false;
    --trials_;
    return may_suffice(network, limits) && try_each(network, limits, options(network, limits));
  }

  const std::vector<Pair>& copies() const { return copies_; }

 private:
  char& open(const Network& network, Pair copy) {
    return open_[static_cast<std::size_t>(copy.first) * network.devices() + copy.second];
  }

  bool usable(const Network& network, const Limits& limits, int expert, int device) {
    return open(network, {expert, device}) && limits.may_enter(network, expert, device);
  }

  // First all sets that contain the first option, then those with the second but not the first, and so on.
  bool try_each(const Network& network, const Limits& limits, const std::vector<Pair>& options) {
    bool reached = false;
    std::size_t tried = 0;
    for (; tried < options.size() && trials_ > 0 && !reached; ++tried) {
      if (tried > 0 && !may_suffice(network, limits)) break;
      const auto [expert, device] = options[tried];
      Network more = network;
      Limits left = limits;
      left.take(more, expert, device);
      more.add_pair(expert, device);
      copies_.push_back(options[tried]);
      reached = reach(std::move(more), left);
      if (!reached) copies_.pop_back();
      open(network, options[tried]) = false;
    }
    while (tried > 0) open(network, options[--tried]) = true;
    return reached;
  }

  // After drain() failed, tokens can leave the devices that it marked only by a copy of one of their experts on another
  // device. Copies that take the most tokens come first; on a tie, those that leave the least room and fewest tokens.
  std::vector<Pair> options(const Network& network, const Limits& limits) {
    Tokens stuck(network.experts(), 0);
    for (int p = 0; p < network.pairs(); ++p)
      if (network.reached(network.device_of[p])) stuck[network.expert_of[p]] += network.amount[p];
    std::vector<std::tuple<std::int64_t, std::int64_t, Pair>> order;
    for (int e = 0; e < network.experts(); ++e) {
      if (stuck[e] == 0 || !limits.can_send(network, e)) continue;
      for (int d = 0; d < network.devices(); ++d) {
        if (network.reached(d) || !usable(network, limits, e, d)) continue;
        const std::int64_t room = target_ - network.load[d];
        order.emplace_back(-std::min(room, stuck[e]), std::max(room, stuck[e]), Pair{e, d});
      }
    }
    std::sort(order.begin(), order.end());
    std::vector<Pair> copies;
    for (const auto& option : order) copies.push_back(std::get<Pair>(option));
    return copies;
  }

  // A necessary condition: whether the devices could compute all tokens if each computes at most the target, and no
  // more than the tokens of the experts that it has and of the hottest that may still enter. Tokens of experts that
  // devices share with each other are counted only once.
  bool may_suffice(const Network& network, const Limits& limits) {
    const std::vector<int> component = components(network);
    Tokens each(network.devices(), 0), apart(network.devices(), 0), together(network.devices(), 0);
    for (int p = 0; p < network.pairs(); ++p) {
      each[network.device_of[p]] += tokens_[network.expert_of[p]];
      together[component[network.device_of[p]]] += network.amount[p];
    }
    for (int d = 0; d < network.devices(); ++d) {
      const std::int64_t entering = hottest_entering(network, limits, d);
      apart[component[d]] += std::min(target_, each[d] + entering);
      together[component[d]] += entering;
    }
    std::int64_t most = 0;
    for (int d = 0; d < network.devices(); ++d) most += std::min(apart[d], together[d]);
    return most >= network.total();
  }

  std::int64_t hottest_entering(const Network& network, const Limits& limits, int device) {
    std::int64_t sum = 0;
    int slots = limits.in[device];
    for (std::size_t i = 0; i < hottest_.size() && slots > 0; ++i)
      if (usable(network, limits, hottest_[i], device)) sum += tokens_[hottest_[i]], --slots;
    return sum;
  }

  const std::int64_t target_;
  int& trials_;
  const Tokens tokens_;              // per expert
  const std::vector<int> hottest_;   // experts
  std::vector<char> open_;           // [experts, devices]: whether sets with this copy are still to be searched
  std::vector<Pair> copies_;
};

}  // namespace

bool backtrack(const Network& network, std::int64_t target, const Limits& limits, int& trials,
               std::vector<Pair>& copies) {
  Search search(network, target, limits, trials);
  if (trials == 0 || !search.reach(network, limits)) return false;
  copies.insert(copies.end(), search.copies().begin(), search.copies().end());
  return true;
}

}  // namespace hecate
