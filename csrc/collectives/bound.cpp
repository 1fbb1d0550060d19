#include <algorithm>

#include "collectives/route.hpp"

namespace hecate {

namespace {

struct Traffic {
  explicit Traffic(const Request& request)
      : in(request.devices), out(request.devices), node_in(request.nodes()), node_out(request.nodes()) {}
  std::vector<std::int64_t> in, out, node_in, node_out;  // bytes

  void add(const Request& request, const Groups& groups, int expert) {
    const int owner = static_cast<int>(request.owner[expert]), home = request.node_of(owner);
    bool sends = false, leaves = false;
    for (int g = 0; g < groups.groups(expert); ++g) {
      const Groups::Group there = groups.of(expert, g);
      for (int i = 0; i < there.size; ++i) in[there.devices[i]] += request.chunk_bytes;
      sends = true;
      if (there.node == home) continue;
      node_in[there.node] += request.chunk_bytes;
      leaves = true;
    }
    if (sends) out[owner] += request.chunk_bytes;
    if (leaves) node_out[home] += request.chunk_bytes;
  }
};

std::int64_t largest(const std::vector<std::int64_t>& a, const std::vector<std::int64_t>& b) {
  return std::max(*std::max_element(a.begin(), a.end()), *std::max_element(b.begin(), b.end()));
}

}  // namespace

std::int64_t bound_ns(const Request& request) {
  Traffic traffic(request);
  const Groups groups(request, false);
  for (int e = 0; e < request.experts; ++e) traffic.add(request, groups, e);
  const Links& links = request.links;
  // A device may send within its node and to other nodes at the same time, so the two bounds are separate.
  const std::int64_t port = links.device + (request.nodes() > 1 ? links.crossing : 0);
  return std::max(wire_ns(largest(traffic.in, traffic.out), port),
                  wire_ns(largest(traffic.node_in, traffic.node_out), links.border));
}

}  // namespace hecate
