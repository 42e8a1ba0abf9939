#!/usr/bin/env bash
# Eight empty replicas on one machine, each with caches of its own, fill themselves from the hub together:
#
#     examples/cold_start.sh Qwen/Qwen2.5-0.5B
#
# On eight machines it is one command each, with a key file and the address of any other node:
#
#     swarm fetch ORG/MODEL --listen 0.0.0.0:7000 --key-file swarm.key --peer OTHER:7000
set -euo pipefail
model=${1:?which model of the hub?}
place=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$place"' EXIT
replicas=(1 2 3 4 5 6 7 8)
pids=(none)
for number in "${replicas[@]}"; do
  peers=()
  for other in "${replicas[@]}"; do [ "$other" = "$number" ] || peers+=(--peer "127.0.0.1:$((7000 + other))"); done
  HF_HUB_CACHE="$place/hub$number" SWARM_CACHE="$place/cache$number" \
    swarm fetch "$model" --json --listen "127.0.0.1:$((7000 + number))" "${peers[@]}" \
    > "$place/$number.json" 2> "$place/$number.log" &
  pids+=($!)
done
for number in "${replicas[@]}"; do
  until [ -s "$place/$number.json" ]; do
    if ! kill -0 "${pids[$number]}" 2>/dev/null; then
      echo "replica $number failed:" >&2
      cat "$place/$number.log" >&2
      exit 1
    fi
    sleep 0.2
  done
  python3 -c "
import json, sys
report = json.load(open(sys.argv[1]))
read = sum(size for name, size in report['sources'].items() if name.startswith('origin '))
print(f\"replica {sys.argv[2]}: {report['seconds']:.1f} s, {read / report['bytes']:.0%} of it from the hub\")
" "$place/$number.json" "$number"
done
