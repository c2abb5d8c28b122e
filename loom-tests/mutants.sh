#!/usr/bin/env bash
# A test that has never failed proves nothing: breaks the code in a copy of the tree, one line at a time, and
# demands that the test named for it fails. Prints a line per mutant; exit status 1 if one survives. ONLY=words runs those
# whose line has these words.
set -euo pipefail
cd "$(dirname "$0")/.."
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
# All that the workspace names, as it is in the working tree.
git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$copy"
export RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$PWD/target/loom-mutants}" RUST_BACKTRACE=0
# What must be compiled once counts for no mutant.
(cd "$copy" && cargo test --release -q -p loom-tests --no-run)
survived=0

# name # file # what stands there # what a mistake would make of it # test binary # test
mutants=(
  'tag overwritten without help#src/pool.rs#            self.help(*free);##pool#a_killed_move_is_settled_exactly'
  'settling ignores the tag#src/pool.rs#if free.tag == Some(Tag { slot, sequence: account.sequence })#if false#pool#a_killed_move_is_settled_exactly'
  'giving back wakes nobody#src/pool.rs#crate::sync::futex_wake_low(self.header.free.atomic());\n        amount#amount#pool#a_starved_fill_is_woken'
  'gate entered without a barrier#src/gate.rs#        light_barrier();\n        if may(self.state.load(Ordering::Acquire))#        if may(self.state.load(Ordering::Acquire))#gate#memory_moves_while_nobody_is_inside'
  'gate opened without waking#src/gate.rs#fetch_or(OPEN, Ordering::Release);\n        self.call();#fetch_or(OPEN, Ordering::Release);#gate#whoever_waits_is_let_in'
  'thread let in without a call#src/gate.rs#self.tickets.store(threads, Ordering::SeqCst);\n        self.call();#self.tickets.store(threads, Ordering::SeqCst);\n        unpark_all(&self.calls);#gate#whoever_waits_is_let_in_by_a_step'
  'gate shut without waiting#src/gate.rs#if passes \& 1 == 0 {#if true {#gate#memory_moves_while_nobody_is_inside'
  'limited gate entered without the pace#src/gate.rs#has_failed(state) || paced \&\& is_open(state)#is_open(state)#gate#nobody_goes_into_a_limited_gate_unpaced'
  'gate left without waking the engine#src/gate.rs#            unpark_all(\&lane.passes);##gate#memory_moves_while_nobody_is_inside'
  'a decision that changes nothing is not published#src/lock.rs#            let published =#            if next.admitted == lock.admitted { return snapshot; }\n            let published =#decide#who_comes_while_the_holder_is_reaped_is_admitted'
  'an entry is overwritten before that is told#src/journal.rs#        self.begun.set(number.wrapping_add(1));\n##journal#a_reader_sees_whole_entries_in_order'
  'a client that is resumed is not rung#src/page/suspension.rs#so no decision rings it.\n        self.ring(slot);#so no decision rings it.#suspension#who_is_resumed_gets_the_gpu'
  'doorbells not rung#src/lock.rs#                self.ring(slot);#let _ = slot;#decide#two_take_turns'
  'a gang is shown a row without a barrier#src/gang_page.rs#.row.store(row, Ordering::SeqCst);\n        fence(Ordering::SeqCst);#.row.store(row, Ordering::Release);#gang#nobody_leaves_while_another_one_begins'
  'turn claimed without a barrier#src/turns/page.rs#        fence(Ordering::SeqCst);\n        let holder = self.settle_turn();#        let holder = self.settle_turn();#turns#two_take_compute_turns'
  'turn given up without a look at the claims#src/turns/page.rs#        // As in `claim_turn`.\n        fence(Ordering::SeqCst);\n        self.settle_turn();##turns#two_take_compute_turns'
  'turn given to nobody in particular#src/turns/page.rs#                self.ring(next);\n##turns#two_take_compute_turns'
  'turn seized without a look at the claims#src/turns/page.rs#        fence(Ordering::SeqCst);\n        self.settle_turn();\n        Some(holder)#        Some(holder)#turns#a_turn_that_is_seized_goes_to_whoever_sleeps'
  'turn free before its holder is overdue#src/turns/page.rs#        self.set_overdue(holder, true);\n        if !self.swap_turn(\&seen, None) {#        if self.swap_turn(&seen, None) { self.set_overdue(holder, true); } else {#turns#a_turn_that_is_not_given_up_is_taken_once'
)
for mutant in "${mutants[@]}"; do
  [[ -z ${ONLY:-} || $mutant == *"$ONLY"* ]] || continue
  IFS='#' read -r name file old new binary test <<<"$mutant"
  cp "$file" "$copy/$file"
  if ! perl -0pi -e 'BEGIN { ($old, $new) = (shift, shift); $old =~ s/\\n/\n/g; $old =~ s/\\&/&/g; $new =~ s/\\n/\n/g } s/\Q$old\E/$new/ or die "nothing to break\n"' "$old" "$new" "$copy/$file"; then
    printf '%-49s %-42s no verdict: the line to break is not there\n' "$name" "$test"
    survived=1
    continue
  fi
  if (cd "$copy" && timeout 120 cargo test --release -q -p loom-tests --test "$binary" "$test") >"$copy/log" 2>&1; then
    printf '%-49s %-42s SURVIVED\n' "$name" "$test"
    survived=1
  elif grep -q 'could not compile' "$copy/log" || ! grep -q panicked "$copy/log"; then
    printf '%-49s %-42s no verdict: it does not compile, or took too long\n' "$name" "$test"
    survived=1
  else
    printf '%-49s %-42s caught\n' "$name" "$test"
  fi
  cp "$file" "$copy/$file"
done
exit $survived
