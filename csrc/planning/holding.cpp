#include "planning/holding.hpp"

namespace hecate {

namespace {

// Takes `pair` out of the list that begins at `head`.
void take_out(int& head, std::vector<int>& next, int pair) {
  int* link = &head;
  while (*link != pair) link = &next[*link];
  *link = next[pair];
}

}  // namespace

Holding::Holding(int experts, int devices, int expected_pairs)
    : expert_head_(experts, -1), device_head_(devices, -1), shared_head_(devices, -1), degree_(experts, 0),
      held_(static_cast<std::size_t>(experts) * devices, false) {
  for (auto* list : {&expert_of, &device_of, &expert_next_, &device_next_, &shared_next_}) list->reserve(expected_pairs);
}

int Holding::add_pair(int expert, int device) {
  const int pair = pairs();
  expert_of.push_back(expert);
  device_of.push_back(device);
  device_next_.push_back(device_head_[device]);
  device_head_[device] = pair;
  expert_next_.push_back(-1);
  shared_next_.push_back(-1);
  link(pair);
  return pair;
}

void Holding::change_expert(int pair, int expert) {
  unlink(pair);
  expert_of[pair] = expert;
  link(pair);
}

// Enters the pair into the lists of its expert.
void Holding::link(int pair) {
  const int expert = expert_of[pair], other = expert_head_[expert];
  expert_next_[pair] = other;
  expert_head_[expert] = pair;
  if (++degree_[expert] == 2) share(other);
  if (degree_[expert] > 1) share(pair);
  held_[place(expert, device_of[pair])] = true;
}

void Holding::unlink(int pair) {
  const int expert = expert_of[pair];
  take_out(expert_head_[expert], expert_next_, pair);
  if (degree_[expert] > 1) unshare(pair);
  if (--degree_[expert] == 1) unshare(expert_head_[expert]);
  held_[place(expert, device_of[pair])] = false;
}

void Holding::share(int pair) {
  shared_next_[pair] = shared_head_[device_of[pair]];
  shared_head_[device_of[pair]] = pair;
}

void Holding::unshare(int pair) { take_out(shared_head_[device_of[pair]], shared_next_, pair); }

}  // namespace hecate
