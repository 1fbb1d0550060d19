// Which devices hold which experts. The pairs of an expert, and those on a device, are linked lists stored in arrays, so
// that adding or changing a pair is cheap.
#pragma once

#include <cstddef>
#include <vector>

namespace hecate {

class Holding {
 public:
  Holding(int experts, int devices, int expected_pairs);

  int add_pair(int expert, int device);
  // The pair's device holds `expert` instead of the pair's present expert.
  void change_expert(int pair, int expert);

  int experts() const { return static_cast<int>(expert_head_.size()); }
  int devices() const { return static_cast<int>(device_head_.size()); }
  int pairs() const { return static_cast<int>(expert_of.size()); }
  int holders(int expert) const { return degree_[expert]; }
  int first_of_expert(int expert) const { return expert_head_[expert]; }
  int next_of_expert(int pair) const { return expert_next_[pair]; }
  int first_on_device(int device) const { return device_head_[device]; }
  int next_on_device(int pair) const { return device_next_[pair]; }
  // Only pairs whose expert has several holders.
  int first_shared(int device) const { return shared_head_[device]; }
  int next_shared(int pair) const { return shared_next_[pair]; }
  bool holds(int expert, int device) const { return held_[place(expert, device)]; }

  std::vector<int> expert_of, device_of;

 private:
  std::size_t place(int expert, int device) const {
    return static_cast<std::size_t>(expert) * device_head_.size() + device;
  }

  void link(int pair);
  void unlink(int pair);
  void share(int pair);
  void unshare(int pair);

  std::vector<int> expert_head_, device_head_, shared_head_, expert_next_, device_next_, shared_next_, degree_;
  std::vector<bool> held_;  // [experts, devices]
};

}  // namespace hecate
