#!/usr/bin/env bash
# make demo: from a folder of action videos to a trained, evaluated Rev2Net that can be watched in MLflow.
# VIDEOS=folder (one folder per class) takes your own videos instead of generated ones.
set -euo pipefail
cd "$(dirname "$0")/.."

started=$SECONDS
say() { printf '\n==> [%d:%02d] %s\n' $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60)) "$*"; }

if [ -n "${VIDEOS:-}" ]; then
    name=$(basename "$VIDEOS")
    clips=$VIDEOS
    # Mirrored clips keep their class in most data sets, though not in the generated one.
    extra=(augment.flip=0.5)
    say "1/4 videos of $VIDEOS"
else
    name=generated
    clips=demo/clips
    extra=()
    say "1/4 rendering generated clips of 8 motions into $clips"
    rev2net synth "$clips"
fi
data=demo/$name
run=demo/runs/$name

say "2/4 preparing shards with optical flow in $data"
rev2net prepare folder "$clips" "$data" --codec vp9 --short-side 128

# Fewer of the configuration's steps, and the low-level penalty as much earlier, so that all takes five minutes.
extra+=(train.duration=100steps loss.ddp_low_from=33steps)
ranks=2
[ "$(nvidia-smi -L 2> /dev/null | grep -c '^GPU')" != 1 ] || ranks=1    # a GPU is for one process
say "3/4 training Rev2Net on $ranks process(es) (DeepSpeed ZeRO-1) into $run, 100 of its 240 steps"
# The launcher's own messages go to a file: what a newcomer should see is the training.
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
deepspeed --quiet --num_gpus "$ranks" --master_port "$port" --module rev2net train configs/demo.yaml data.path="$data" output="$run" "${extra[@]}" \
    2> demo/launcher.log || { status=$?; tail -n 20 demo/launcher.log >&2; exit $status; }

say "4/4 testing the I3D that is left at test time, 3 clips of each video"
rev2net eval "$run" "$data" --views 3x1 --confusion "$run/confusion_3x1.png"

say "done"
echo "pictures   $run/decoders.png  $run/confusion_matrix.png"
echo "watch it   .venv/bin/mlflow ui --host 127.0.0.1 --backend-store-uri sqlite:///$PWD/demo/runs/mlflow.db"
echo "           then open http://127.0.0.1:5000 in a browser"
