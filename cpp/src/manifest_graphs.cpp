#include <algorithm>
#include <set>

#include "manifest_fields.hpp"

namespace l2a::core {
namespace {

constexpr std::size_t kMostVariants = 256;

// An allocation as the manifest writes it; the think limit matters only where two are compared.
struct Allocation {
    std::int64_t num_groups = 0;
    std::vector<std::vector<std::int64_t>> groups;
    std::optional<std::int64_t> think_tokens;

    friend bool operator==(const Allocation& one, const Allocation& other) {
        return one.num_groups == other.num_groups && one.groups == other.groups &&
               one.think_tokens == other.think_tokens;
    }
    // Both have the same number of layers; groups ascend.
    [[nodiscard]] bool is_subset(const Allocation& other) const {
        for (std::size_t layer = 0; layer < groups.size(); ++layer) {
            const auto& whole = other.groups[layer];
            if (!std::includes(whole.begin(), whole.end(), groups[layer].begin(), groups[layer].end())) return false;
        }
        return true;
    }
};

struct Parsed {
    GraphEntry entry;
    std::optional<Allocation> allocation;
};

Allocation allocation_of(const Json& data, const std::string& what) {
    manifest_check.keys(data, what, {"num_groups", "groups", "think_tokens"}, {"think_tokens"});
    Allocation found;
    found.num_groups = manifest_check.integer(data["num_groups"], what + ": num_groups", 1);
    for (const Json& kept : list(data["groups"], what + ": groups")) {
        auto& layer = found.groups.emplace_back();
        for (const Json& group : list(kept, what + ": groups")) {
            const auto number = manifest_check.integer(group, what + ": a group", 0, found.num_groups - 1);
            if (!layer.empty() && number <= layer.back()) {
                bundle_error(what + ": groups must be ascending without repeats, found " + shown(kept));
            }
            layer.push_back(number);
        }
    }
    if (found.groups.empty()) bundle_error(what + ": groups must list the kept KV groups of at least one layer");
    if (data.contains("think_tokens") && !data["think_tokens"].is_null()) {
        found.think_tokens = manifest_check.integer(data["think_tokens"], what + ": think_tokens", 0);
    }
    return found;
}

void check_sizes(const Json& data, const std::string& what) {
    const std::vector<std::string> names{"batch", "sequence", "total", "past", "present"};
    manifest_check.keys(data, what + ": sizes", names);
    for (const std::string& name : names)
        manifest_check.integer(data[name], what + ": " + name, name == "past" ? 0 : 1);
}

Parsed graph_of(const Json& data, std::size_t place) {
    std::string what = "graphs[" + std::to_string(place) + "]";
    manifest_check.keys(data, what, {"name", "file", "kind", "budget", "allocation", "cost", "sizes"});
    Parsed found;
    GraphEntry& entry = found.entry;
    entry.name = manifest_check.line(data["name"], what + ": graph.name");
    entry.file = manifest_check.line(data["file"], what + ": graph.file");
    what += ": graph " + entry.name;
    const std::vector<std::string> kinds{"if", "told", "variant", "static", "router"};
    const std::string& kind = one_of(data["kind"], what + ": kind", kinds);
    entry.kind = static_cast<Kind>(std::find(kinds.begin(), kinds.end(), kind) - kinds.begin());
    const bool fixed = entry.kind == Kind::variant || entry.kind == Kind::fixed;
    if (fixed == data["allocation"].is_null() || fixed == data["budget"].is_null()) {
        bundle_error(what + ": a variant has a budget and an allocation, other graphs neither");
    }
    if ((entry.kind == Kind::fixed) == data["sizes"].is_null()) {
        bundle_error(what + ": a static graph has sizes, other graphs none");
    }
    if (entry.kind == Kind::fixed) check_sizes(data["sizes"], what);
    manifest_check.share(data["cost"], what + ": cost");
    if (fixed) {
        entry.budget = manifest_check.share(data["budget"], what + ": budget");
        found.allocation = allocation_of(data["allocation"], what + ": allocation");
        for (const auto& kept : found.allocation->groups) {
            entry.widths.push_back(static_cast<std::int64_t>(kept.size()));
        }
    }
    return found;
}

// Names of their own, listed files, and variants that are a nested ladder.
void check_graphs(const std::vector<Parsed>& graphs, const Manifest& manifest) {
    std::set<std::string> names;
    std::vector<const Allocation*> variants;
    for (const Parsed& graph : graphs) {
        names.insert(graph.entry.name);
        if (graph.entry.kind == Kind::variant) variants.push_back(&*graph.allocation);
    }
    if (graphs.empty() || names.size() != graphs.size())
        bundle_error("graphs must be at least one, each of its own name");
    if (variants.size() > kMostVariants) {
        bundle_error("graphs must have at most 256 variants, found " + std::to_string(variants.size()));
    }
    double budget = 1.0;
    std::vector<const Allocation*> level;
    std::vector<const Allocation*> above;
    for (const Parsed& graph : graphs) {
        const std::string what = "graph " + graph.entry.name;
        if (manifest.files.count(graph.entry.file) == 0) {
            bundle_error(what + ": its file " + shown(graph.entry.file) + " is not listed in files");
        }
        if (!graph.allocation) continue;
        const Allocation& allocation = *graph.allocation;
        if (static_cast<std::int64_t>(allocation.groups.size()) != manifest.shape.num_layers ||
            allocation.num_groups != manifest.shape.num_groups) {
            bundle_error(what + ": its allocation is of another model shape");
        }
        if (graph.entry.kind == Kind::fixed) {
            if (std::none_of(variants.begin(), variants.end(), [&](auto* known) { return *known == allocation; })) {
                bundle_error(what + ": has fixed shapes of an allocation that is no variant's");
            }
            continue;
        }
        if (graph.entry.budget > budget) {
            bundle_error(what + ": its budget is above that of a variant before it; variants must be nested");
        }
        if (graph.entry.budget < budget) {
            budget = graph.entry.budget;
            above = std::exchange(level, {});
        }
        if (!above.empty() &&
            std::none_of(above.begin(), above.end(), [&](auto* larger) { return allocation.is_subset(*larger); })) {
            bundle_error(what + ": is not a part of a variant before it; variants must be nested");
        }
        level.push_back(&allocation);
    }
}

}  // namespace

std::vector<GraphEntry> graphs_of(const Json& data, const Manifest& manifest) {
    std::vector<Parsed> graphs;
    for (const Json& graph : list(data, "graphs")) graphs.push_back(graph_of(graph, graphs.size()));
    check_graphs(graphs, manifest);
    std::vector<GraphEntry> found;
    for (Parsed& graph : graphs) found.push_back(std::move(graph.entry));
    return found;
}

}  // namespace l2a::core
