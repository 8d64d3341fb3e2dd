// Parts of reading manifest.json that its files share.
#pragma once

#include <string>
#include <vector>

#include "bundle.hpp"
#include "json.hpp"

namespace l2a::core {

inline constexpr Check manifest_check{L2A_ERROR_BUNDLE};

// The text of `known` that a value is.
const std::string& one_of(const Json& value, const std::string& name, const std::vector<std::string>& known);
// A value that is a list.
const Json& list(const Json& value, const std::string& name);
// The graphs: of names of their own, in listed files, the variants a nested ladder.
std::vector<GraphEntry> graphs_of(const Json& data, const Manifest& manifest);

}  // namespace l2a::core
