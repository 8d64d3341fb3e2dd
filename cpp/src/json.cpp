#include "json.hpp"

#include <algorithm>
#include <cmath>

namespace l2a::core {
namespace {

constexpr std::size_t kDeepest = 32;  // levels of objects and lists
constexpr std::size_t kMostShown = 100;
constexpr std::size_t kLongestLine = 255;

// Builds the document and refuses what the library would let pass.
class Strict : public nlohmann::json_sax<Json> {
  public:
    Json root;
    std::string why;

    bool null() override { return put(nullptr); }
    bool boolean(bool value) override { return put(value); }
    bool number_integer(number_integer_t value) override { return put(value); }
    bool number_unsigned(number_unsigned_t value) override { return put(value); }
    bool number_float(number_float_t value, const string_t& literal) override {
        if (literal.find_first_of(".eE") == string_t::npos) return refuse("an integer of more than 64 bits");
        return std::isfinite(value) ? put(value) : refuse("a number that is not finite");
    }
    bool string(string_t& value) override { return put(std::move(value)); }
    bool binary(binary_t&) override { return refuse("binary data"); }
    bool start_object(std::size_t) override { return open(Json::object()); }
    bool start_array(std::size_t) override { return open(Json::array()); }
    bool end_object() override { return close(); }
    bool end_array() override { return close(); }
    bool key(string_t& value) override {
        if (stack_.back()->contains(value)) return refuse("key " + shown(value) + " stands twice in an object");
        keys_.back() = std::move(value);
        return true;
    }
    bool parse_error(std::size_t place, const std::string&, const nlohmann::detail::exception& error) override {
        if (why.empty()) why = "at byte " + std::to_string(place) + ": " + error.what();
        return false;
    }

  private:
    std::vector<Json*> stack_;
    std::vector<std::string> keys_;

    bool refuse(std::string reason) {
        why = std::move(reason);
        return false;
    }
    Json* place(Json value) {
        if (stack_.empty()) return &(root = std::move(value));
        Json& parent = *stack_.back();
        if (parent.is_object()) return &(parent[keys_.back()] = std::move(value));
        parent.push_back(std::move(value));
        return &parent.back();
    }
    bool put(Json value) {
        place(std::move(value));
        return true;
    }
    bool open(Json value) {
        if (stack_.size() >= kDeepest) {
            return refuse("more than " + std::to_string(kDeepest) + " levels of objects and lists");
        }
        stack_.push_back(place(std::move(value)));
        keys_.emplace_back();
        return true;
    }
    bool close() {
        stack_.pop_back();
        keys_.pop_back();
        return true;
    }
};

std::size_t characters(std::string_view utf8) {
    return static_cast<std::size_t>(
        std::count_if(utf8.begin(), utf8.end(), [](char unit) { return (unit & 0xC0) != 0x80; }));
}

// U+0000 to U+001F, U+007F to U+009F.
bool has_control(std::string_view utf8) {
    for (std::size_t at = 0; at < utf8.size(); ++at) {
        const auto unit = static_cast<unsigned char>(utf8[at]);
        if (unit < 0x20 || unit == 0x7F) return true;
        if (unit == 0xC2 && at + 1 < utf8.size() && static_cast<unsigned char>(utf8[at + 1]) < 0xA0) return true;
    }
    return false;
}

bool has(const std::vector<std::string>& names, const std::string& name) {
    return std::find(names.begin(), names.end(), name) != names.end();
}

}  // namespace

Json parse_json(std::string_view text) {
    if (text.substr(0, 3) == "\xEF\xBB\xBF") throw std::invalid_argument("it begins with a byte order mark");
    Strict strict;
    if (!Json::sax_parse(text.begin(), text.end(), &strict)) throw std::invalid_argument(strict.why);
    return std::move(strict.root);
}

std::string shown(const Json& value) {
    std::string text = value.dump(-1, ' ', true, Json::error_handler_t::replace);
    return text.size() <= kMostShown ? text : text.substr(0, kMostShown) + "...";
}

const Json& Check::keys(const Json& value, const std::string& name, const std::vector<std::string>& keys,
                        const std::vector<std::string>& optional) const {
    if (!value.is_object()) fail(name + ": expected an object, found " + shown(value));
    for (const auto& item : value.items()) {
        if (!has(keys, item.key())) fail(name + ": unknown key " + shown(item.key()));
    }
    for (const std::string& key : keys) {
        if (!value.contains(key) && !has(optional, key)) fail(name + ": key " + shown(key) + " is missing");
    }
    return value;
}

std::int64_t Check::integer(const Json& value, const std::string& name, std::int64_t least, std::int64_t most) const {
    if (!value.is_number_integer()) fail(name + " must be an integer, found " + shown(value));
    // A manifest may have integers up to 2^64 - 1: beyond 2^63 - 1 they mean "without bound" wherever they are allowed.
    const bool large = value.is_number_unsigned() && value.get<std::uint64_t>() > static_cast<std::uint64_t>(INT64_MAX);
    const auto found = large ? INT64_MAX : value.get<std::int64_t>();
    if (found < least) fail(name + " must be at least " + std::to_string(least) + ", found " + shown(value));
    if (found > most) fail(name + " must be at most " + std::to_string(most) + ", found " + shown(value));
    return found;
}

double Check::number(const Json& value, const std::string& name) const {
    if (!value.is_number()) fail(name + " must be a number, found " + shown(value));
    return value.get<double>();
}

double Check::share(const Json& value, const std::string& name) const {
    const double found = number(value, name);
    if (!(found > 0.0 && found <= 1.0)) fail(name + " must lie within (0, 1], found " + shown(value));
    return found;
}

bool Check::flag(const Json& value, const std::string& name) const {
    if (!value.is_boolean()) fail(name + " must be true or false, found " + shown(value));
    return value.get<bool>();
}

std::string Check::text(const Json& value, const std::string& name) const {
    if (!value.is_string() || value.get_ref<const std::string&>().empty()) {
        fail(name + " must be a non-empty string, found " + shown(value));
    }
    return value.get<std::string>();
}

std::string Check::line(const Json& value, const std::string& name) const {
    std::string found = text(value, name);
    if (characters(found) > kLongestLine || has_control(found)) {
        fail(name + " must be at most 255 characters, none of control, found " + shown(value));
    }
    return found;
}

std::string Check::sha256(const Json& value, const std::string& name) const {
    std::string found = text(value, name);
    const bool digits = std::all_of(found.begin(), found.end(), [](char digit) {
        return (digit >= '0' && digit <= '9') || (digit >= 'a' && digit <= 'f');
    });
    if (found.size() != 64 || !digits) fail(name + " must be 64 hexadecimal digits, found " + shown(value));
    return found;
}

}  // namespace l2a::core
