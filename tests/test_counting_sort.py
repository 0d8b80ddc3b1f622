"""The counting sort: the same stable order on any number of segments, of which the CPU uses one."""

import random
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parent.parent / "csrc"
# keys on stdin; one line of begins and order for each number of segments
PROGRAM = """
#include <cstdio>
#include <cstdlib>
#include <vector>
#include "common/counting_sort.h"

int main(int, char** arguments) {
  const int64_t num_keys = atoll(arguments[1]), most_segments = atoll(arguments[2]);
  std::vector<int64_t> keys;
  for (long long key; scanf("%lld", &key) == 1;) keys.push_back(key);
  for (int64_t segments = 1; segments <= most_segments; ++segments) {
    std::vector<int64_t> places(segments * num_keys, -1), begins(num_keys + 1, -1), order(keys.size(), -1);
    const minirl::CountingSort sort = {keys.data(), (int64_t)keys.size(), num_keys, segments,
                                       places.data(), begins.data(), order.data()};
    // any order of the workers within a phase will do
    for (int64_t segment = segments; segment-- > 0;) minirl::count_segment(sort, segment);
    minirl::places_of_counts(sort);
    for (int64_t segment = segments; segment-- > 0;) minirl::order_segment(sort, segment);
    for (int64_t begin : begins) printf("%lld ", (long long)begin);
    for (int64_t item : order) printf("%lld ", (long long)item);
    puts("");
  }
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no c++ on the PATH")
    folder = tmp_path_factory.mktemp("counting_sort")
    (folder / "sort.cpp").write_text(PROGRAM)
    command = [compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-I", CSRC, "sort.cpp", "-o", "sort"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "sort"


@pytest.mark.parametrize(("items", "num_keys"), [(0, 1), (1, 1), (6, 8), (100, 1), (1000, 17), (5, 300)])
def test_against_sorted(items, num_keys, program):
    generator = random.Random(items)
    keys = [generator.randrange(num_keys) for _ in range(items)]
    begins = [sum(key < bound for key in keys) for bound in range(num_keys + 1)]
    expected = begins + sorted(range(items), key=lambda item: keys[item])
    found = subprocess.run(
        [program, str(num_keys), "7"], input=" ".join(map(str, keys)), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert [list(map(int, line.split())) for line in found] == [expected] * 7
