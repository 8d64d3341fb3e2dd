#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cmath>
#include <fstream>
#include <limits>
#include <sstream>
#include <stdexcept>

#include "signals.hpp"

namespace l2a::core {
namespace {

double cores() {
    return static_cast<double>(std::max(1L, sysconf(_SC_NPROCESSORS_ONLN)));
}

class Host : public Source {
  public:
    Host(const std::string& root, const std::string& only) : Source(only), proc_(root + "/proc") {}
    void read(std::vector<Reading>& into) override {
        add(into, "host.memory_available", "bytes", [&] { return memory("MemAvailable:"); });
        add(into, "host.memory_total", "bytes", [&] { return memory("MemTotal:"); });
        add(into, "host.load", "share", [&] { return number_at(lines_of(proc_ + "/loadavg").at(0)) / cores(); });
        add(into, "host.cores", "cores", cores);
    }

  private:
    std::string proc_;

    double memory(const std::string& key) const {
        for (const std::string& line : lines_of(proc_ + "/meminfo")) {
            std::istringstream words(line);
            std::string name;
            double kilobytes = 0;
            if (words >> name >> kilobytes && name == key) return kilobytes * 1024;
        }
        throw std::runtime_error(proc_ + "/meminfo has no " + key);
    }
};

// From the kernel's running totals between two readings: a squeeze must be seen sooner than its averages show it.
class Pressure : public Source {
  public:
    Pressure(const std::string& root, std::function<double()> clock)
        : folder_(root + "/proc/pressure/"), clock_(std::move(clock)) {}
    void read(std::vector<Reading>& into) override {
        for (Line& line : lines_) add(into, line.name, "share", [&] { return share(line); });
    }

  private:
    struct Total {
        double at;
        double waited;
    };
    struct Line {
        const char* name;
        const char* resource;
        const char* kind;
        std::deque<Total> totals;
    };
    static constexpr double kSeconds = 1.0;
    static constexpr double kAverage = 10.0;  // seconds of avg10, which is newer than what a longer pause shows

    std::string folder_;
    std::function<double()> clock_;
    std::vector<Line> lines_{{"pressure.cpu_some", "cpu", "some", {}},
                             {"pressure.memory_some", "memory", "some", {}},
                             {"pressure.memory_full", "memory", "full", {}},
                             {"pressure.io_some", "io", "some", {}},
                             {"pressure.io_full", "io", "full", {}}};

    static double field(const std::string& line, const std::string& key) {
        const std::size_t place = line.find(key + "=");
        if (place == std::string::npos) throw std::runtime_error("no " + key + " in: " + line);
        return number_at(std::string_view(line).substr(place + key.size() + 1));
    }

    double share(Line& line) const {
        for (const std::string& text : lines_of(folder_ + line.resource)) {
            if (text.rfind(line.kind, 0) != 0) continue;
            const double now = clock_();
            auto& totals = line.totals;
            if (!totals.empty() && totals.back().at < now - kAverage) totals.clear();
            totals.push_back({now, field(text, "total") / 1e6});
            while (totals.size() > 2 && totals[1].at <= now - kSeconds) totals.pop_front();
            const double passed = now - totals.front().at;
            if (passed < kSeconds / 10) return field(text, "avg10") / 100;
            return std::min(1.0, (totals.back().waited - totals.front().waited) / passed);
        }
        throw std::runtime_error(folder_ + line.resource + " has no line " + line.kind);
    }
};

}  // namespace

void Source::add(std::vector<Reading>& into, const char* name, const char* unit,
                 const std::function<double()>& value) const {
    if (!only_.empty() && only_ != name) return;
    try {
        into.push_back({name, unit, value(), {}});
    } catch (const std::exception& error) {
        into.push_back({name, unit, std::numeric_limits<double>::quiet_NaN(), error.what()});
    }
}

std::unique_ptr<Source> host_source(const std::string& root, const std::string& only) {
    return std::make_unique<Host>(root, only);
}
std::unique_ptr<Source> pressure_source(const std::string& root, std::function<double()> clock) {
    return std::make_unique<Pressure>(root, clock ? std::move(clock) : steady_seconds);
}

std::function<double()> memory_source(const std::string& root) {
    const std::vector<std::shared_ptr<Source>> sources{host_source(root, "host.memory_available"),
                                                       cgroup_source(root, "cgroup.memory_available")};
    return [sources] {
        std::vector<Reading> readings;
        for (const auto& source : sources) source->read(readings);
        double left = std::numeric_limits<double>::quiet_NaN();
        for (const Reading& reading : readings) left = std::fmin(left, reading.value);
        return left;
    };
}

double steady_seconds() {
    const auto since = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration<double>(since).count();
}

std::vector<std::string> lines_of(const std::string& path) {
    std::ifstream file(path);
    if (!file) throw std::runtime_error(path + ": cannot be read");
    std::vector<std::string> found;
    for (std::string line; std::getline(file, line);) found.push_back(line);
    if (file.bad()) throw std::runtime_error(path + ": cannot be read");
    return found;
}

double number_at(std::string_view text) {
    while (!text.empty() && text.front() == ' ') text.remove_prefix(1);
    double value = 0;
    const auto [rest, code] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (code != std::errc()) throw std::runtime_error("not a number: " + std::string(text));
    return value;
}

bool is_file(const std::string& path) {
    struct stat status {};
    return stat(path.c_str(), &status) == 0 && S_ISREG(status.st_mode);
}

}  // namespace l2a::core
