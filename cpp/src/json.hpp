// JSON as docs/bundle.md wants it: stricter than the library that reads it.
#pragma once

#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "error.hpp"

namespace l2a::core {

using Json = nlohmann::json;

// Parses UTF-8 text. Refuses: a byte order mark, a key twice in an object, integers beyond 64 bits, numbers that are
// not finite, text that is not Unicode, and more than 32 levels of objects and lists. Throws std::invalid_argument.
Json parse_json(std::string_view text);

// As a message shows a value: a long one is cut.
std::string shown(const Json& value);

// Checks of single values; `name` says where one stands, `code` is that of the error thrown.
struct Check {
    l2a_code code;

    [[noreturn]] void fail(const std::string& message) const { throw Error(code, message); }
    // Returns the object, which has exactly these keys (`optional` ones may be left out).
    const Json& keys(const Json& value, const std::string& name, const std::vector<std::string>& keys,
                     const std::vector<std::string>& optional = {}) const;
    std::int64_t integer(const Json& value, const std::string& name, std::int64_t least,
                         std::int64_t most = INT64_MAX) const;
    double number(const Json& value, const std::string& name) const;  // finite
    double share(const Json& value, const std::string& name) const;   // in (0, 1]
    bool flag(const Json& value, const std::string& name) const;
    std::string text(const Json& value, const std::string& name) const;  // not empty
    std::string line(const Json& value, const std::string& name) const;  // 1 to 255 characters, none of control
    std::string sha256(const Json& value, const std::string& name) const;
};

}  // namespace l2a::core
