// A flow network: which devices hold each expert and how many of its tokens each of them computes. Tokens move between
// the holders of an expert to balance the devices.
#pragma once

#include <cstdint>
#include <vector>

namespace hecate {

using Tokens = std::vector<std::int64_t>;

// A bipartite graph of experts and devices whose edges are holder pairs. A pair's amount is the number of the expert's
// tokens that the device computes. The pairs of an expert, and those on a device, are linked lists stored in arrays, so
// that adding a pair is cheap.
class Network {
 public:
  Network(int experts, int devices, int expected_pairs);

  int add_pair(int expert, int device, std::int64_t amount = 0);
  void add_amount(int pair, std::int64_t tokens);

  int experts() const { return static_cast<int>(expert_head_.size()); }
  int devices() const { return static_cast<int>(device_head_.size()); }
  int pairs() const { return static_cast<int>(expert_of.size()); }
  int holders(int expert) const { return degree_[expert]; }
  int first_of_expert(int expert) const { return expert_head_[expert]; }
  int next_of_expert(int pair) const { return expert_next_[pair]; }
  int first_on_device(int device) const { return device_head_[device]; }
  int next_on_device(int pair) const { return device_next_[pair]; }
  bool holds(int expert, int device) const { return held_[static_cast<std::size_t>(expert) * load.size() + device]; }
  std::int64_t total() const;

  // Moves tokens between holders until no device has more than `target`. Returns false if that is impossible; `reached`
  // then marks a set of devices that tokens cannot leave, each with at least `target` tokens.
  bool drain(std::int64_t target);
  // Returns the smallest achievable maximum device load, and sets amounts that reach it.
  std::int64_t min_max();
  bool reached(int device) const { return level_[device] >= 0; }

  std::vector<int> expert_of, device_of;
  Tokens amount;  // per pair
  Tokens load;    // per device

 private:
  bool levels(std::int64_t target);
  std::int64_t push(int device, std::int64_t limit, std::int64_t target);

  std::vector<int> expert_head_, device_head_, expert_next_, device_next_, degree_;
  std::vector<bool> held_;  // [experts, devices]
  std::vector<int> level_, seen_, queue_, next_pair_;
};

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace hecate
