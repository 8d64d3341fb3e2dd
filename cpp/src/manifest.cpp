#include <set>
#include <utility>

#include "manifest_fields.hpp"

namespace l2a::core {
namespace {

constexpr std::int64_t kSchemaVersion = 1;
constexpr std::int64_t kMost = 1024;  // layers, and groups of each
constexpr std::int64_t kMostPositions = INT32_MAX;  // sums of lengths and tensors' sizes stay far from overflow

}  // namespace

const std::string& one_of(const Json& value, const std::string& name, const std::vector<std::string>& known) {
    std::string all;
    for (const std::string& text : known) {
        if (value == text) return text;
        all += (all.empty() ? "" : ", ") + text;
    }
    bundle_error(name + " must be one of " + all + ", found " + shown(value));
}

const Json& list(const Json& value, const std::string& name) {
    if (!value.is_array()) bundle_error(name + " must be a list, found " + shown(value));
    return value;
}

namespace {

Shape shape_of(const Json& data) {
    manifest_check.keys(data, "shape",
                        {"num_layers", "hidden_size", "intermediate_size", "num_heads", "num_groups", "head_dim",
                         "vocab_size", "tied"});
    Shape shape;
    manifest_check.flag(data["tied"], "shape.tied");
    const auto size = [&](const char* name, std::int64_t most = INT64_MAX) {
        return manifest_check.integer(data[name], std::string("shape.") + name, 1, most);
    };
    shape.num_layers = size("num_layers", kMost);
    shape.hidden_size = size("hidden_size");
    shape.intermediate_size = size("intermediate_size");
    shape.num_heads = size("num_heads");
    shape.num_groups = size("num_groups", kMost);
    shape.head_dim = size("head_dim");
    shape.vocab_size = size("vocab_size");
    if (shape.num_heads % shape.num_groups != 0) {
        bundle_error("shape.num_heads must be a multiple of num_groups, found " + std::to_string(shape.num_heads) +
                     " and " + std::to_string(shape.num_groups));
    }
    return shape;
}

Tags tags_of(const Json& data, const Shape& shape) {
    const std::vector<std::string> names{"think", "end_think", "answer", "end_answer"};
    manifest_check.keys(data, "tags", names);
    std::vector<std::int64_t> ids;
    for (const std::string& name : names) {
        ids.push_back(manifest_check.integer(data[name], "tags." + name, 0, shape.vocab_size - 1));
    }
    if (std::set<std::int64_t>(ids.begin(), ids.end()).size() != ids.size()) {
        bundle_error("tags must be four different tokens, found " + shown(data));
    }
    return {ids[0], ids[1], ids[2], ids[3]};
}

void check_widths(const Json& data, const Shape& shape) {
    std::int64_t last = 0;
    for (const Json& width : list(data, "widths")) {
        const std::int64_t before = std::exchange(last, manifest_check.integer(width, "widths", 1, shape.num_groups));
        if (last <= before) bundle_error("widths must ascend, found " + shown(data));
    }
    if (last != shape.num_groups) {
        bundle_error("widths must end with all " + std::to_string(shape.num_groups) + " groups, found " + shown(data));
    }
}

Prices prices_of(const Json& data) {
    Prices found;
    for (const Json& pair : list(data, "prices")) {
        if (!pair.is_array() || pair.size() != 2) {
            bundle_error("prices must be a list of [budget, price] pairs, found " + shown(data));
        }
        const double budget = manifest_check.share(pair[0], "prices: a budget");
        if (!found.empty() && budget <= found.back().first) bundle_error("prices: budgets must ascend");
        found.emplace_back(budget, manifest_check.number(pair[1], "prices: a price"));
    }
    return found;
}

std::map<std::string, FileEntry> files_of(const Json& data) {
    if (!data.is_object()) bundle_error("files must be an object, found " + shown(data));
    std::map<std::string, FileEntry> found;
    for (const auto& item : data.items()) {
        const std::string name = manifest_check.line(Json(item.key()), "files: a path");
        if (!is_inside(name) || name == kManifest) {
            bundle_error("files: " + shown(item.key()) + " is not a path inside the bundle folder");
        }
        manifest_check.keys(item.value(), "files." + name, {"sha256", "size"});
        found[name] = {
            manifest_check.sha256(item.value()["sha256"], "files." + name + ".sha256"),
            static_cast<std::uint64_t>(manifest_check.integer(item.value()["size"], "files." + name + ".size", 0))};
    }
    if (found.count(kWeights) == 0) bundle_error("files must list weights.bin");
    return found;
}

void check_texts(const Json& data, const std::string& name, const std::vector<std::string>* only) {
    if (only != nullptr) manifest_check.keys(data, name, *only);
    if (!data.is_object()) bundle_error(name + " must be an object, found " + shown(data));
    for (const auto& item : data.items()) manifest_check.text(item.value(), name + "." + item.key());
}

void read_gates(const Json& data, Manifest& manifest) {
    if (!data.is_object()) bundle_error("gates must be an object, found " + shown(data));
    const Json missing;
    const auto field = [&](const char* name) -> const Json& { return data.contains(name) ? data[name] : missing; };
    GateRules& rules = manifest.rules;
    rules.stem_layers =
        manifest_check.integer(field("stem_layers"), "gates.stem_layers", 1, manifest.shape.num_layers - 1);
    rules.think_reference = manifest_check.integer(field("think_reference"), "gates.think_reference", 1);
    manifest.tokens = manifest_check.flag(field("tokens"), "gates.tokens");
    if (!data.contains("input_blind")) return;
    for (const Json& contract : list(data["input_blind"], "gates.input_blind")) {
        const bool cap = one_of(contract, "gates.input_blind", {"cap", "mean"}) == "cap";
        rules.input_blind.push_back(cap ? Contract::cap : Contract::mean);
    }
}

}  // namespace

Manifest Manifest::parse(std::string_view text) {
    Json data;
    try {
        data = parse_json(text);
    } catch (const std::invalid_argument& error) {
        bundle_error(std::string("not JSON (") + error.what() + "); the file is corrupt");
    }
    manifest_check.keys(data, "Bundle",
                        {"schema_version", "base", "artifact", "shape", "dialect", "precision", "gates", "tags",
                         "positions", "widths", "whole_cache", "prices", "graphs", "quality", "versions", "files"});
    if (const auto version = manifest_check.integer(data["schema_version"], "schema_version", 1);
        version > kSchemaVersion) {
        bundle_error("schema_version " + std::to_string(version) + " is newer than " + std::to_string(kSchemaVersion) +
                     ", the latest this library reads; upgrade it");
    }
    Manifest found;
    found.shape = shape_of(data["shape"]);
    const auto cost = CostModel::of(found.shape);
    if (!cost) bundle_error("shape: the cost of all layers must be an integer of 64 bits with a sign, found more");
    found.cost = *cost;
    found.dialect = one_of(data["dialect"], "dialect", {"ort", "standard"});
    one_of(data["precision"], "precision", {"fp32", "fp16", "bf16", "int8", "fp8", "int4"});
    manifest_check.sha256(data["artifact"], "artifact");
    found.positions = manifest_check.integer(data["positions"], "positions", 1, kMostPositions);
    found.whole_cache = manifest_check.flag(data["whole_cache"], "whole_cache");
    const std::vector<std::string> base{"name", "family", "digest"};
    check_texts(data["base"], "base", &base);
    check_texts(data["versions"], "versions", nullptr);
    read_gates(data["gates"], found);
    found.tags = tags_of(data["tags"], found.shape);
    check_widths(data["widths"], found.shape);
    found.rules.prices = prices_of(data["prices"]);
    for (const Json& point : list(data["quality"], "quality")) {
        if (!point.is_object()) bundle_error("quality must be a list of objects, found " + shown(point));
    }
    found.files = files_of(data["files"]);
    found.graphs = graphs_of(data["graphs"], found);
    for (std::size_t place = 0; place < found.graphs.size(); ++place) {
        if (found.graphs[place].kind == Kind::variant) found.variants.push_back(place);
    }
    return found;
}

}  // namespace l2a::core
