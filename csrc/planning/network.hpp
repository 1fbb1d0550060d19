// How the tokens of experts are divided among the devices that hold them, and how they move between these to balance
// the devices: a flow on a bipartite graph of experts and devices whose edges are the pairs of a `Holding`.
#pragma once

#include <cstdint>
#include <vector>

#include "planning/holding.hpp"

namespace hecate {

using Tokens = std::vector<std::int64_t>;

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// The amounts of one set of loads. A pair's amount is the number of the expert's tokens that the device computes.
// Several flows may share one `Holding`, which all calls must be given.
class Flow {
 public:
  Flow(int experts, int devices, int expected_pairs);

  // The newest pair of `holding`, on `device`, gets `tokens`.
  void add_pair(int device, std::int64_t tokens);
  void add_amount(const Holding& holding, int pair, std::int64_t tokens);
  std::int64_t total() const;

  // Moves tokens between holders until no device has more than `target`. Returns false if that is impossible; `stuck`
  // then lists devices that tokens cannot leave, each with at least `target` tokens.
  bool drain(const Holding& holding, std::int64_t target);
  // Returns the smallest achievable maximum device load that is at least `target`, and sets amounts that reach it.
  std::int64_t min_max(const Holding& holding, std::int64_t target);
  bool reached(int device) const { return level_[device] >= 0; }
  const std::vector<int>& stuck() const { return queue_; }

  Tokens amount;  // per pair
  Tokens load;    // per device

 private:
  bool levels(const Holding& holding, std::int64_t target);
  void enter(const Holding& holding, int device, int level);
  std::int64_t push(const Holding& holding, int device, std::int64_t limit, std::int64_t target);

  std::vector<int> level_, queue_;       // per device; devices in the order in which they were reached
  std::vector<int> next_pair_;           // per device: the first pair that may still lead to a device with room
  std::vector<int> expert_level_;
  std::vector<int> next_holder_;         // per expert: the first holder's pair that may still lead to one
};

// One set of loads with a `Holding` of its own.
class Network : public Holding, public Flow {
 public:
  Network(int experts, int devices, int expected_pairs)
      : Holding(experts, devices, expected_pairs), Flow(experts, devices, expected_pairs) {}

  int add_pair(int expert, int device, std::int64_t tokens = 0) {
    Flow::add_pair(device, tokens);
    return Holding::add_pair(expert, device);
  }
  void add_amount(int pair, std::int64_t tokens) { Flow::add_amount(*this, pair, tokens); }
  bool drain(std::int64_t target) { return Flow::drain(*this, target); }
  std::int64_t min_max() { return Flow::min_max(*this, ceil_div(total(), devices())); }
};

}  // namespace hecate
