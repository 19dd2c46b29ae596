// A stand-in for nlohmann's json.hpp: what the generated plugin uses, for a syntax check only.
#ifndef STAND_IN_JSON_HPP
#define STAND_IN_JSON_HPP

#include <string>

namespace nlohmann {
class json {
 public:
  static json parse(const char *text);
  const json &operator[](const char *key) const;
  bool operator==(const char *text) const;
  operator std::string() const;
  const json *begin() const;
  const json *end() const;
};
}  // namespace nlohmann

#endif
