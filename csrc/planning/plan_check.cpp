#include "planning/plan_check.hpp"

#include <algorithm>

namespace hecate {

Tokens device_loads(const PlanArrays& plan, const Shape& shape) {
  Tokens loads(shape.devices, 0), of_pair(plan.pairs, 0);
  for (int s = 0; s < shape.devices; ++s)
    for (std::int64_t p = 0; p < plan.pairs; ++p) of_pair[p] += plan.quota[s * plan.pairs + p];
  for (std::int64_t p = 0; p < plan.pairs; ++p) loads[plan.holders[2 * p + 1]] += of_pair[p];
  return loads;
}

std::int64_t count_crossings(const PlanArrays& plan, const Shape& shape) {
  std::int64_t crossings = 0, last_expert = -1, last_node = -1;
  for (std::int64_t p = 0; p < plan.pairs; ++p) {
    const std::int64_t expert = plan.holders[2 * p], node = plan.holders[2 * p + 1] / shape.devices_per_node;
    const bool seen = expert == last_expert && node == last_node;
    crossings += !seen && node != plan.owners[expert] / shape.devices_per_node;
    last_expert = expert;
    last_node = node;
  }
  return crossings;
}

std::string plan_fault(const PlanArrays& plan, const Shape& shape) {
  std::int64_t held = 0;
  for_each_true(plan.placement, shape.experts * shape.devices, [&](int) { ++held; });
  if (held != plan.pairs)
    return std::to_string(plan.pairs) + " holders, placement has another number of pairs";
  std::int64_t last = -1;
  for (std::int64_t p = 0; p < plan.pairs; ++p) {
    const std::int64_t expert = plan.holders[2 * p], device = plan.holders[2 * p + 1];
    const auto name = [&] { return "holder (" + std::to_string(expert) + ", " + std::to_string(device) + ")"; };
    const bool exists = expert >= 0 && expert < shape.experts && device >= 0 && device < shape.devices;
    if (!exists) return name() + " does not exist";
    if (!plan.placement[expert * shape.devices + device]) return name() + " is not in placement";
    if (expert * shape.devices + device <= last) return name() + " is out of order, holders must ascend";
    last = expert * shape.devices + device;
  }
  for (std::int64_t e = 0; e < shape.experts; ++e) {
    const std::int64_t owner = plan.owners[e];
    if (owner < 0 || owner >= shape.devices || !plan.placement[e * shape.devices + owner])
      return "owner " + std::to_string(owner) + " of expert " + std::to_string(e) + " does not hold it";
  }
  const std::int64_t entries = shape.devices * plan.pairs;
  std::int64_t signs = 0;
  for (std::int64_t i = 0; i < entries; ++i) signs |= plan.quota[i];
  if (signs < 0) {
    const auto* entry = std::find_if(plan.quota, plan.quota + entries, [](std::int64_t q) { return q < 0; });
    return "quota has " + std::to_string(*entry) + ", must be >= 0";
  }
  const Tokens loads = device_loads(plan, shape);
  for (int d = 0; d < shape.devices; ++d)
    if (loads[d] != plan.device_loads[d])
      return "device_loads[" + std::to_string(d) + "] is " + std::to_string(plan.device_loads[d]) + ", quota gives " +
             std::to_string(loads[d]);
  return "";
}

}  // namespace hecate
