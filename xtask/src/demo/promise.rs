//! What a scheduler promises about the order of real servers, and whether it was kept.
//!
//! `rr` and `wrr` go round: in one period, as many requests as the weights have in sum (their common divisor taken out),
//! each real server answers as often as its weight says, and every period is like the one before. Where in the period the
//! first request falls is nobody's promise.

use super::lab::SERVERS;

/// A scheduler with weights.
pub(super) struct Promise {
    pub(super) scheduler: &'static str,
    pub(super) weights: [usize; SERVERS.len()],
}

impl Promise {
    /// The number of requests after which the order begins again. The weights have no common divisor.
    pub(super) fn period(&self) -> usize {
        self.weights.iter().sum()
    }

    /// Says what is not as promised in a list of answers (the real server's index, or none for no answer).
    pub(super) fn check(&self, answers: &[Option<usize>]) -> Result<(), String> {
        let unanswered = answers.iter().filter(|answer| answer.is_none()).count();
        if unanswered > 0 {
            return Err(format!("{unanswered} of {} requests got no answer", answers.len()));
        }
        let period = self.period();
        if let Some(at) = (period..answers.len()).find(|&at| answers[at] != answers[at - period]) {
            return Err(format!(
                "request {} was not answered by the real server that answered request {}",
                at + 1,
                at + 1 - period
            ));
        }
        for (index, weight) in self.weights.iter().enumerate() {
            let count = answers.iter().take(period).filter(|answer| **answer == Some(index)).count();
            if count != *weight {
                return Err(format!("{} answered {count} of {period} requests, not {weight}", SERVERS[index].name()));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(weights: [usize; 3], answers: &[usize]) -> Result<(), String> {
        Promise { scheduler: "wrr", weights }.check(&answers.iter().map(|&index| Some(index)).collect::<Vec<_>>())
    }

    #[test]
    fn any_rotation_of_the_period_keeps_the_promise() {
        assert_eq!(check([1, 1, 1], &[0, 1, 2, 0, 1, 2]), Ok(()));
        assert_eq!(check([1, 1, 1], &[2, 0, 1, 2, 0, 1]), Ok(()));
        assert_eq!(check([2, 1, 1], &[0, 0, 1, 2, 0, 0, 1, 2]), Ok(()));
        assert_eq!(check([2, 1, 1], &[1, 2, 0, 0, 1, 2, 0, 0]), Ok(()));
    }

    #[test]
    fn wrong_counts_wrong_order_and_silence_break_it() {
        assert!(check([1, 1, 1], &[0, 0, 0, 0, 0, 0]).is_err());
        assert!(check([1, 1, 1], &[0, 1, 2, 0, 2, 1]).is_err());
        assert!(check([2, 1, 1], &[0, 1, 2, 0, 1, 2, 0, 1]).is_err());
        assert!(Promise { scheduler: "rr", weights: [1, 1, 1] }.check(&[Some(0), None, Some(2)]).is_err());
        assert!(check([1, 1, 1], &[]).is_err());
    }
}
