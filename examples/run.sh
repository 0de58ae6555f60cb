#!/usr/bin/env bash
# Run an example with Snakemake on this machine, and go on with what an earlier run left:
#
#   examples/run.sh quickstart OUTPUT [SETTING=VALUE ...] [FLAGS OF SNAKEMAKE]   # quickstart, quickstart-full, quickstart-smoke
#   examples/run.sh smollm2_135m OUTPUT [...]              # or claims
#   examples/run.sh rehearse-RECIPE OUTPUT [...]             # llama2_7b, mistral_7b or llama3_8b with a toy model
#   examples/run.sh plan-RECIPE OUTPUT -- plan               # what its trainings and searches would take
#   examples/run.sh plan-RECIPE OUTPUT -- preflight          # what would stop it late
#
# It is what `make quickstart`, `make real`, `make claims`, `make rehearse` and `make plan` start. Snakemake locks its folder and keeps it locked
# when it is killed; here a lock that the kernel drops with the last process says whether it is in use.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
PYTHON=${PYTHON:-python}
name=$1 output=$2
shift 2
settings=("output=$output")
while [[ ${1:-} =~ ^[a-z_]+= ]]; do # over those of the configuration files
  settings+=("$1")
  shift
done
recipe=${name#*-} configs=() order=()
case $name in
  quickstart*) # each stage waits for the one before it; what only measures runs beside them
    recipe=quickstart order=(--prioritize factors/final.json)
    [[ $name == quickstart ]] || configs=("$here/quickstart/${name#quickstart-}.yaml")
    ;;
  smollm2_135m | claims | rehearse-*) ;;
  plan-*) ;;
  *)
    echo "run.sh: error: $name is unknown; see the top of ${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac
snakefile=$here/$recipe/Snakefile
if [[ ! -f $snakefile ]]; then # a model of the progressive extension
  snakefile=$here/progressive/Snakefile
  configs=("$here/$recipe/config.yaml")
fi
if [[ $name == rehearse-* ]]; then
  for overlay in progressive "$recipe"; do
    [[ -f $here/$overlay/rehearsal.yaml && ($overlay == "$recipe" || $snakefile == */progressive/*) ]] &&
      configs+=("$here/$overlay/rehearsal.yaml")
  done
fi
mkdir -p "$output"
exec {lock}>"$output/.run.lock"
flock --nonblock "$lock" || {
  echo "run.sh: error: another run works in $output; wait for it or end it" >&2
  exit 1
}
[[ $name == rehearse-* ]] && "$PYTHON" "$here/rehearse.py" "$recipe" "$output/inputs"
command=("$PYTHON" -m snakemake -s "$snakefile" --profile "$here/profiles/local"
  "${order[@]}" ${configs[0]:+--configfile "${configs[@]}"} --config "${settings[@]}")
# Nobody works here, so locks are of a run that was killed.
if [[ -n $(ls "$output/.snakemake/locks" 2>/dev/null) ]]; then
  said=$("${command[@]}" --unlock 2>&1) || {
    echo "$said" >&2
    exit 1
  }
fi
exec "${command[@]}" "$@"
