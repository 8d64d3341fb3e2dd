// Sources: https://docs.kernel.org/admin-guide/cgroup-v2.html and .../cgroup-v1/memory.html
#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>
#include <map>
#include <sstream>
#include <stdexcept>

#include "files.hpp"
#include "signals.hpp"

namespace l2a::core {
namespace {

constexpr double kNoLimit = std::numeric_limits<double>::infinity();
constexpr double kUnlimited = 1152921504606846976.0;  // 2^60; version 1 writes a number near 2^63 for no limit

using Levels = std::vector<std::string>;  // the group's folder and those around it, the innermost first

double number(const std::string& text) {
    std::istringstream words(text);
    std::string word;
    words >> word;
    if (word == "max") return kNoLimit;
    std::int64_t value = 0;
    const auto [rest, code] = std::from_chars(word.data(), word.data() + word.size(), value);
    if (code == std::errc::result_out_of_range) return kNoLimit;
    if (code != std::errc() || rest != word.data() + word.size()) throw std::runtime_error("not a number: " + text);
    return static_cast<double>(value) >= kUnlimited ? kNoLimit : static_cast<double>(value);
}

double number_in(const std::string& path) {
    const auto lines = lines_of(path);
    if (lines.empty()) throw std::runtime_error(path + ": is empty");
    return number(lines.front());
}

std::map<std::string, double> table(const std::string& path) {
    std::map<std::string, double> found;
    for (const std::string& line : lines_of(path)) {
        std::istringstream words(line);
        std::string key;
        double value = 0;
        if (words >> key >> value) found[key] = value;
    }
    return found;
}

double entry(const std::string& path, const std::string& key) {
    const auto found = table(path);
    const auto value = found.find(key);
    if (value == found.end()) throw std::runtime_error(path + ": has no " + key);
    return value->second;
}

// The innermost group that has the file; the root has few of them.
std::string first(const Levels& levels, const std::string& name) {
    for (const std::string& level : levels) {
        if (is_file(level + "/" + name)) return level + "/" + name;
    }
    throw std::runtime_error("no " + name + " in " + levels.front());
}

double least(const Levels& levels, const std::string& name) {
    first(levels, name);
    double found = kNoLimit;
    for (const std::string& level : levels) {
        if (is_file(level + "/" + name)) found = std::min(found, number_in(level + "/" + name));
    }
    return found;
}

// How memory.stat calls pages of files.
struct Files {
    const char* inactive;
    const char* active;
    const char* mapped;  // among both
};

constexpr Files kFiles1{"total_inactive_file", "total_active_file", "total_mapped_file"};
constexpr Files kFiles2{"inactive_file", "active_file", "file_mapped"};

// Without what the kernel can give back: pages of files that no process maps. What was read twice is active.
double used(const std::string& level, const std::string& name, const Files& files) {
    auto stat = table(level + "/memory.stat");  // what it does not have is 0
    const double inactive = stat[files.inactive];
    const double unmapped = inactive + stat[files.active] - stat[files.mapped];
    return std::max(0.0, number_in(level + "/" + name) - std::max(inactive, unmapped));
}

std::string folder_of(const std::string& path) {
    return path.substr(0, path.rfind('/'));
}

// Groups around this one may be nearer to their limit than this one to its own.
// `high`, where there is one, is a mark above which tasks are held back.
double left(const Levels& levels, const std::string& limit, const std::string& high, const std::string& current,
            const Files& files) {
    first(levels, limit);
    double found = kNoLimit;
    bool any = false;
    for (const std::string& level : levels) {
        if (!is_file(level + "/" + limit) || !is_file(level + "/" + current)) continue;
        any = true;
        double most = number_in(level + "/" + limit);
        if (!high.empty() && is_file(level + "/" + high)) most = std::min(most, number_in(level + "/" + high));
        if (most < kNoLimit) found = std::min(found, most - used(level, current, files));
    }
    if (!any) throw std::runtime_error("no group has both " + limit + " and " + current);
    return std::max(0.0, found);
}

double quota(const Levels& levels) {
    double found = kNoLimit;
    for (const std::string& level : levels) {
        if (!is_file(level + "/cpu.max")) continue;
        std::istringstream words(lines_of(level + "/cpu.max").at(0));
        std::string most;
        double period = 0;
        if (words >> most >> period && most != "max") found = std::min(found, number_at(most) / period);
    }
    return found;
}

double quota_1(const Levels& levels) {
    double found = kNoLimit;
    for (const std::string& level : levels) {
        if (!is_file(level + "/cpu.cfs_quota_us")) continue;
        const double most = number_in(level + "/cpu.cfs_quota_us");
        if (most >= 0) found = std::min(found, most / number_in(level + "/cpu.cfs_period_us"));
    }
    return found;
}

class Cgroup : public Source {
  public:
    Cgroup(const std::string& root, const std::string& only) : Source(only), root_(root) {}
    void read(std::vector<Reading>& into) override {
        const std::string mount = root_ + "/sys/fs/cgroup";
        std::map<std::string, std::string> groups;  // path of this process's group by controller; version 2: ""
        std::string why;
        try {
            groups = paths();
        } catch (const std::exception& error) {
            why = error.what();
        }
        if (is_file(mount + "/cgroup.controllers")) {
            version_2(into, levels(mount, groups[""], why));
        } else {
            version_1(into, levels(mount + "/memory", groups["memory"], why),
                      levels(mount + "/cpu", groups["cpu"], why));
        }
    }

  private:
    std::string root_;

    // Levels, or why there are none.
    struct Found {
        Levels levels;
        std::string why;
        const Levels& get() const {
            if (!why.empty()) throw std::runtime_error(why);
            return levels;
        }
    };

    std::map<std::string, std::string> paths() const {
        std::map<std::string, std::string> found;
        for (const std::string& line : lines_of(root_ + "/proc/self/cgroup")) {
            const std::size_t one = line.find(':');
            const std::size_t two = line.find(':', one + 1);
            if (one == std::string::npos || two == std::string::npos) continue;
            std::istringstream names(line.substr(one + 1, two - one - 1));
            std::string name;
            if (two == one + 1) found[""] = line.substr(two + 1);
            while (std::getline(names, name, ',')) found[name] = line.substr(two + 1);
        }
        return found;
    }

    // A container often sees its own group as the root of the mount while /proc/self/cgroup names its path outside.
    static Found levels(const std::string& mount, std::string path, const std::string& why) {
        if (!why.empty()) return {{}, why};
        while (!path.empty() && path.back() == '/') path.pop_back();
        std::string group = mount + path;
        if (path.find("..") != std::string::npos || !is_folder(group)) group = mount;
        Found found;
        for (; group.size() > mount.size(); group = folder_of(group)) found.levels.push_back(group);
        found.levels.push_back(mount);
        return found;
    }

    void version_2(std::vector<Reading>& into, const Found& at) const {
        add(into, "cgroup.memory_limit", "bytes", [&] { return least(at.get(), "memory.max"); });
        add(into, "cgroup.memory_high", "bytes", [&] { return least(at.get(), "memory.high"); });
        add(into, "cgroup.memory_used", "bytes",
            [&] { return used(folder_of(first(at.get(), "memory.current")), "memory.current", kFiles2); });
        add(into, "cgroup.memory_available", "bytes",
            [&] { return left(at.get(), "memory.max", "memory.high", "memory.current", kFiles2); });
        add(into, "cgroup.memory_hits", "count", [&] {
            auto events = table(first(at.get(), "memory.events"));
            return events["high"] + events["max"];
        });
        add(into, "cgroup.oom_kills", "count", [&] { return table(first(at.get(), "memory.events"))["oom_kill"]; });
        add(into, "cgroup.cpu_limit", "cores", [&] { return quota(at.get()); });
        add(into, "cgroup.cpu_throttled", "seconds",
            [&] { return entry(first(at.get(), "cpu.stat"), "throttled_usec") / 1e6; });
    }

    void version_1(std::vector<Reading>& into, const Found& memory, const Found& cpu) const {
        add(into, "cgroup.memory_limit", "bytes", [&] { return least(memory.get(), "memory.limit_in_bytes"); });
        add(into, "cgroup.memory_high", "bytes", [&] { return least(memory.get(), "memory.soft_limit_in_bytes"); });
        add(into, "cgroup.memory_used", "bytes", [&] {
            return used(folder_of(first(memory.get(), "memory.usage_in_bytes")), "memory.usage_in_bytes", kFiles1);
        });
        add(into, "cgroup.memory_available", "bytes", [&] {
            return left(memory.get(), "memory.limit_in_bytes", "", "memory.usage_in_bytes", kFiles1);
        });
        add(into, "cgroup.memory_hits", "count", [&] { return number_in(first(memory.get(), "memory.failcnt")); });
        add(into, "cgroup.oom_kills", "count",
            [&] { return entry(first(memory.get(), "memory.oom_control"), "oom_kill"); });
        add(into, "cgroup.cpu_limit", "cores", [&] { return quota_1(cpu.get()); });
        add(into, "cgroup.cpu_throttled", "seconds",
            [&] { return entry(first(cpu.get(), "cpu.stat"), "throttled_time") / 1e9; });
    }
};

}  // namespace

std::unique_ptr<Source> cgroup_source(const std::string& root, const std::string& only) {
    return std::make_unique<Cgroup>(root, only);
}

}  // namespace l2a::core
