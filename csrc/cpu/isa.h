// Which instruction sets this build has, which this processor can run, and which is in use.
#pragma once
#include <string>
#include <vector>

namespace minirl {

std::vector<std::string> isa_built();
std::vector<std::string> isa_supported();  // built, and this processor runs it; best last
std::string isa_name();

// Use `name` from now on; std::invalid_argument with the choices if it is not supported.
void set_isa(const std::string& name);

}  // namespace minirl
