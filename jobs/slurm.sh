#!/bin/bash
# An array job: each task answers one shard. Put in your input, model and limits, then:
#     sbatch jobs/slurm.sh
#     dspark-batch merge out.parquet parts/part-*.parquet
#SBATCH --job-name=dspark-batch
#SBATCH --array=1-16
#SBATCH --gpus=1
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --output=part-%a.log
#SBATCH --open-mode=append

shards=16 # as many as the array has; not SLURM_ARRAY_TASK_COUNT, which is fewer when some run again
part=$SLURM_ARRAY_TASK_ID

mkdir -p parts
dspark-batch run prompts.jsonl -o "parts/part-$part.parquet" --shard "$part/$shards" \
    --family qwen3 --max-runtime 3h45m --quiet
code=$?
# 75: out of time, memory or disk. Its rows are safe, and the next start continues.
if [ "$code" = 75 ]; then
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_$part"
fi
exit "$code"
